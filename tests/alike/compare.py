"""What differs between two outcomes of one request."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.alike.outcome import Outcome
from tests.alike.requests import Request

_TOLERANCE = 1e-4
"""Of log-probabilities."""
_OWN = {"created", "created_at", "completed_at", "system_fingerprint", "cached_tokens"}
"""Fields that each server may fill as it likes; that both have them is compared."""
_IDS = {"id", "item_id", "call_id", "tool_call_id"}
_SHOWN = 240
"""Characters of a value."""


@dataclass(frozen=True)
class Difference:
    """`where` is a path into the answer, such as `choices[].message.content`; for `status` the sides are Outcomes."""

    where: str
    stock: Any
    ours: Any


ABSENT = "(no such field)"


def differences(stock: Outcome, ours: Outcome) -> list[Difference]:
    """All of them. Of two refusals only the status is compared: how they are worded is each server's own."""
    if stock.status != ours.status:
        return [Difference("status", stock, ours)]
    if stock.status != 200:
        return []
    return list(_differences("", stock.content, ours.content))


def told(request: Request, difference: Difference) -> str:
    """A difference in four lines, for people."""
    return (
        f"{request.path} {_short(request.options)}\n"
        f"  at {difference.where}\n"
        f"  stock: {_short(difference.stock)}\n"
        f"  ours:  {_short(difference.ours)}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _differences(where: str, stock: Any, ours: Any) -> Iterator[Difference]:
    if isinstance(stock, dict) and isinstance(ours, dict):
        for name in sorted({*stock, *ours}):
            path = f"{where}.{name}" if where else name
            pair = stock.get(name, ABSENT), ours.get(name, ABSENT)
            if ABSENT in pair:
                yield Difference(path, *pair)
            else:
                yield from _differences(path, *(_comparable(name, value) for value in pair))
    elif isinstance(stock, list) and isinstance(ours, list):
        if len(stock) != len(ours):
            yield Difference(f"{where}[]", stock, ours)
            return
        for one, other in zip(stock, ours, strict=True):
            yield from _differences(f"{where}[]", one, other)
    elif not _equal(stock, ours):
        yield Difference(where, stock, ours)


def _comparable(name: str, value: Any) -> Any:
    """An id without its random part, and nothing of what is each server's own but that it is there."""
    if name in _IDS and isinstance(value, str):
        return re.sub(r"[0-9a-f]{8,}", "*", value)
    return None if name in _OWN else value


def _equal(stock: Any, ours: Any) -> bool:
    if type(stock) is not type(ours):
        return False
    if isinstance(stock, float):
        return math.isclose(stock, ours, rel_tol=0, abs_tol=_TOLERANCE)
    return bool(stock == ours)
