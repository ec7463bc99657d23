"""What is there twice, and what is both trained on and measured on; rows are named by number, never by content."""

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
    """Counts of rows. An example is a pair of row numbers from 1, in the order the rows were read."""

    train: int
    evaluation: int
    duplicates: int
    """Training rows that are exactly like an earlier one. They are kept."""
    duplicate: tuple[int, int] | None
    """Example: a training row, and the earlier one it is like."""
    leaks: int
    """Evaluation rows whose prompt is learnt in training too."""
    leak: tuple[int, int] | None
    """Example: an evaluation row, and the training row that asks the same."""
    general: int
    general_leaks: int
    """Rows of general ability whose prompt is learnt in training too."""
    general_leak: tuple[int, int] | None
    """Example: such a row, and the training row that asks the same."""

    def log(self) -> None:
        """Tell of what is wrong, if anything is."""
        if self.duplicate:
            log.warning(
                "%d of %d training rows are exactly like an earlier one, such as row %d like row %d; all are kept",
                self.duplicates, self.train, *self.duplicate,
            )  # fmt: skip
        if self.leak:
            log.warning(
                "%d of %d evaluation rows ask what a training row asks, such as row %d what training row %d asks: "
                "the evaluation says less about new questions than it seems to",
                self.leaks, self.evaluation, *self.leak,
            )  # fmt: skip
        if self.general_leak:
            log.warning(
                "%d of %d rows of general_files ask what a training row asks, such as row %d what training row %d: "
                "what is learnt cannot say what is forgotten",
                self.general_leaks, self.general, *self.general_leak,
            )  # fmt: skip


def report(train: Sequence[Row], evaluation: Sequence[Row], general: Sequence[Row] = ()) -> Report:
    """Compare rows of any of the canonical kinds. A row that its source's weight repeats counts once."""
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
    """The rows whose prompt is one of those asked, each with the row that asks it."""
    found = []
    for number, row in _distinct(rows):
        *_, prompt = _prompts(row)
        if same := asked.get(_digest(prompt)):
            found.append((number, same))
    return found


def _distinct(rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers, but for those that are the same object as an earlier one: repeated by weight."""
    seen: set[int] = set()
    for number, row in enumerate(rows, 1):
        if id(row) not in seen:
            seen.add(id(row))
            yield number, row


def _prompts(row: Row) -> Iterator[list[str]]:
    """What is said before each answer, without the system message: another one makes no new question."""
    if "text" in row:
        yield [row["text"].strip()]
        return
    messages: list[Message] = row["messages"] if "messages" in row else row["prompt"]
    said = [message["content"].strip() for message in messages if message["role"] != "system"]
    # A conversation has an answer, and so a prompt, in every second place; a prompt is only the whole.
    for end in range(1, len(said), 2) if "messages" in row else [len(said)]:
        yield said[:end]


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
