"""Finds duplicates, and rows that are both trained and evaluated on. Reports row numbers, never content."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from training.data.chats import Message, Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Counts of rows, and examples as pairs of row numbers, from 1 in reading order."""

    train: int
    evaluation: int
    duplicates: int
    """Training rows that are identical to an earlier one. They are kept."""
    duplicate: tuple[int, int] | None
    """Example: a training row and the earlier row."""
    leaks: int
    """Evaluation rows whose prompt is also in the training rows."""
    leak: tuple[int, int] | None
    """Example: an evaluation row and the training row with the same prompt."""
    general: int
    general_leaks: int
    """Rows of general_files whose prompt is also in the training rows."""
    general_leak: tuple[int, int] | None
    """Example: such a row and the training row with the same prompt."""

    def log(self) -> None:
        """Log duplicates and leaks, if there are any."""
        if self.duplicate:
            log.warning(
                "%d of %d training rows are duplicates, such as row %d of row %d; all are kept",
                self.duplicates, self.train, *self.duplicate,
            )  # fmt: skip
        if self.leak:
            log.warning(
                "%d of %d evaluation rows have the prompt of a training row, such as row %d that of training row %d: "
                "the evaluation overestimates the quality on new prompts",
                self.leaks, self.evaluation, *self.leak,
            )  # fmt: skip
        if self.general_leak:
            log.warning(
                "%d of %d rows of general_files have the prompt of a training row, such as row %d that of training "
                "row %d: such rows do not measure forgetting",
                self.general_leaks, self.general, *self.general_leak,
            )  # fmt: skip


def report(train: Sequence[Row], evaluation: Sequence[Row], general: Sequence[Row] = ()) -> Report:
    """Compare canonical rows of any kind. A row repeated by the weight of its source counts once."""
    first: dict[bytes, int] = {}
    asked: dict[bytes, int] = {}
    duplicates = []
    for number, row in _distinct(train):
        earlier = first.setdefault(_digest(row), number)
        if earlier != number:
            duplicates.append((number, earlier))
        for prompt in _prompts(row):
            asked.setdefault(_digest(prompt), number)
    leaks, general_leaks = _leaks(evaluation, asked), _leaks(general, asked)
    return Report(
        train=len(list(_distinct(train))),
        evaluation=len(list(_distinct(evaluation))),
        duplicates=len(duplicates),
        duplicate=duplicates[0] if duplicates else None,
        leaks=len(leaks),
        leak=leaks[0] if leaks else None,
        general=len(list(_distinct(general))),
        general_leaks=len(general_leaks),
        general_leak=general_leaks[0] if general_leaks else None,
    )


def _leaks(rows: Sequence[Row], asked: dict[bytes, int]) -> list[tuple[int, int]]:
    """Return the rows whose prompt is in `asked`, each with its training row."""
    found = []
    for number, row in _distinct(rows):
        *_, prompt = _prompts(row)
        if same := asked.get(_digest(prompt)):
            found.append((number, same))
    return found


def _distinct(rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    """Yield rows with their numbers, without repetitions by weight, which are the same object."""
    seen: set[int] = set()
    for number, row in enumerate(rows, 1):
        if id(row) not in seen:
            seen.add(id(row))
            yield number, row


def _prompts(row: Row) -> Iterator[list[str]]:
    """Yield the messages before each answer, without the system message, which does not make a question new."""
    if "text" in row:
        yield [row["text"].strip()]
        return
    messages: list[Message] = row["messages"] if "messages" in row else row["prompt"]
    said = [message["content"].strip() for message in messages if message["role"] != "system"]
    # In a conversation every second message is an answer; a row of another kind is one prompt.
    for end in range(1, len(said), 2) if "messages" in row else [len(said)]:
        yield said[:end]


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
