"""Leaving out the oldest messages of a long conversation."""

import asyncio
from typing import Any

import pytest

from app.engine.history import Cut, Message, within

SYSTEM = {"role": "system", "content": "x" * 10}


def conversation(turns: int) -> list[Message]:
    said = [("user", "q"), ("assistant", "a")] * turns + [("user", "q")]
    return [SYSTEM, *({"role": role, "content": f"{word}{i:04}"} for i, (role, word) in enumerate(said))]


def cut(messages: list[Message], limit: int) -> tuple[list[Message], Cut | None, int]:
    """Return the kept messages, the cut and the number of counts; a message counts its characters and 3 more."""
    counted = 0

    async def count(some: list[Message]) -> int:
        nonlocal counted
        counted += 1
        return sum(len(one["content"]) + 3 for one in some)

    kept, tokens, what = asyncio.run(within(messages, limit, count))
    assert tokens == sum(len(one["content"]) + 3 for one in kept)
    return kept, what, counted


def test_conversations_that_fit_are_unchanged() -> None:
    messages = conversation(3)
    assert cut(messages, 13 + 7 * 8) == (messages, None, 1)


@pytest.mark.parametrize("limit", [40, 100, 800, 1620])
def test_only_as_many_oldest_turns_as_needed_are_left_out(limit: int) -> None:
    messages = conversation(100)
    kept, what, counted = cut(messages, limit)
    assert kept[0] is SYSTEM
    assert kept[1]["role"] == "user"
    assert kept[1:] == messages[-len(kept) + 1 :]
    size = 13 + 8 * (len(kept) - 1)
    assert size <= limit < size + 2 * 8, "another turn would have fitted"
    assert what == Cut(messages=len(messages) - len(kept), tokens=8 * (len(messages) - len(kept)))
    assert counted <= 10


def test_the_last_turn_stays_even_if_too_long() -> None:
    messages = conversation(5)
    assert cut(messages, 3)[0] == [SYSTEM, messages[-1]]
    assert cut([SYSTEM, messages[-1]], 3)[1] is None


def test_a_tool_result_stays_with_its_call() -> None:
    turn: list[Any] = [
        {"role": "user", "content": "order"},
        {"role": "assistant", "content": "call."},
        {"role": "tool", "content": "done."},
        {"role": "assistant", "content": "there"},
    ]
    kept, _, _ = cut([*turn, *turn, *turn], 8 * 8 + 7)
    assert kept == [*turn, *turn]


def test_later_system_messages_belong_to_their_turn() -> None:
    messages: list[Message] = [*conversation(3), SYSTEM, {"role": "user", "content": "last?"}]
    kept, _, _ = cut(messages, 30)
    assert kept == [SYSTEM, messages[-1]]
