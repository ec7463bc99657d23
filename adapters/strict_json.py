"""JSON that all parsers read alike: no duplicate keys, no NaN or infinity, limited depth."""

import json
import math
from typing import Any

_MAX_DEPTH = 32


def loads(text: str | bytes) -> Any:
    """Parse UTF-8 JSON. Raises ValueError for invalid JSON, and for JSON that parsers could read differently."""
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_constant=_finite,
            parse_float=_finite,
            object_pairs_hook=_no_key_twice,
        )
        is_deep = _depth(value) > _MAX_DEPTH
    except RecursionError:
        is_deep = True
    if is_deep:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
