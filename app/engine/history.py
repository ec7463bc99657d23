"""Long conversations: which messages are left out so that the rest fits, oldest turns first."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Cut:
    """What of a conversation the model was not given."""

    messages: int
    tokens: int


async def within(
    messages: Sequence[Message], limit: int, count: Callable[[list[Message]], Awaitable[int]]
) -> tuple[list[Message], int, Cut | None]:
    """The messages that `count` to at most `limit` tokens with all that is around them, their tokens, and what was left
    out.

    What the conversation begins with as system prompt stays, and so does the last turn, whatever it counts to. A turn
    begins with a message of the user: an answer is never kept without its question, or a tool's result without its
    call. Counts a handful of times, for a conversation of any length.
    """
    whole = await count([*messages])
    if whole <= limit:
        return [*messages], whole, None
    first = next((i for i, one in enumerate(messages) if one.get("role") not in _SYSTEM), len(messages))
    starts = [i for i, one in enumerate(messages) if i > first and one.get("role") == "user"]
    if not starts:
        return [*messages], whole, None

    async def size_from(start: int) -> int:
        return await count([*messages[:first], *messages[start:]])

    # The first turn that can stay: sizes only fall from one start to the next.
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if await size_from(starts[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    start = starts[low]
    kept = [*messages[:first], *messages[start:]]
    tokens = await count(kept)
    return kept, tokens, Cut(messages=start - first, tokens=whole - tokens)
