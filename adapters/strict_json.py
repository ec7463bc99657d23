"""JSON that every reader reads alike: no key twice, no NaN or infinity, no depth that ends a reader."""

import json
import math
from typing import Any

_MAX_DEPTH = 32


def loads(text: str | bytes) -> Any:
    """`json.loads` of UTF-8; raises ValueError for what another reader could take for something else."""
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
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
