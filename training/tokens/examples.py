"""Rows as the tokens that trainers take: in one way for all stages, the way in which a service renders them too.

Each function leaves out rows that the chat template refuses, if the job says so (`on_error`), and rows longer than
`max_length`, which cut in two would teach something else. What is left of the rows stays beside their tokens: golden
prompts are taken from it.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from datasets import Dataset

from training.config import OnError
from training.data import Row, judge, place
from training.errors import DataError
from training.tokens.loss_mask import MaskError, Message, encode, encode_chat, encode_prompt

log = logging.getLogger(__name__)

Tokens = dict[str, Any]
"""What a trainer takes of one row: lists of token ids by name, and what else the stage needs."""


@dataclass(frozen=True)
class Examples:
    """Rows that are learnt from, and the tokens of each."""

    rows: list[Row]
    tokens: list[Tokens]

    def dataset(self) -> Dataset | None:
        """As trainers take them; None without rows."""
        return Dataset.from_list(self.tokens) if self.tokens else None


def encoded(
    rows: Sequence[Row], on_error: OnError, encode_row: Callable[[Row], Tokens]
) -> list[tuple[Row, Tokens]]:
    """Each row with its tokens. Raises DataError naming every row that the template refuses, unless told to skip."""
    found: list[tuple[Row, Tokens]] = []
    problems = []
    for row in rows:
        try:
            found.append((row, encode_row(row)))
        except MaskError as reason:
            problems.append(f"{place(row)}: {reason}")
    judge(problems, on_error)
    return found


def pairs(rows: Sequence[Row], tokenizer: Any, max_length: int, on_error: OnError) -> Examples:
    """`prompt_ids`, `chosen_ids` and `rejected_ids`: an answer ends with the token that stops it."""

    def encode_row(row: Row) -> Tokens:
        chosen, rejected = (_split(tokenizer, row["prompt"], row[which]) for which in ("chosen", "rejected"))
        # The template may open the two answers differently: what both begin with is the prompt.
        alike = takewhile(lambda two: two[0] == two[1], zip(chosen[0], rejected[0], strict=False))
        shared = min(chosen[1], rejected[1], sum(1 for _ in alike))
        return {
            "prompt_ids": chosen[0][:shared],
            "chosen_ids": chosen[0][shared:],
            "rejected_ids": rejected[0][shared:],
        }

    return _within(
        max_length,
        encoded(rows, on_error, encode_row),
        lambda tokens: (
            len(tokens["prompt_ids"]) + max(len(tokens["chosen_ids"]), len(tokens["rejected_ids"]))
        ),
    )


def feedback(rows: Sequence[Row], tokenizer: Any, max_length: int, on_error: OnError) -> Examples:
    """`prompt_ids`, `completion_ids` and `label`."""

    def encode_row(row: Row) -> Tokens:
        ids, begin = _split(tokenizer, row["prompt"], row["completion"])
        return {"prompt_ids": ids[:begin], "completion_ids": ids[begin:], "label": row["label"]}

    return _within(
        max_length,
        encoded(rows, on_error, encode_row),
        lambda tokens: len(tokens["prompt_ids"]) + len(tokens["completion_ids"]),
    )


def conversations(rows: Sequence[Row], tokenizer: Any, max_length: int, on_error: OnError) -> Examples:
    """`chosen_ids` and `rejected_ids`: whole conversations, as a reward is read from them."""

    def encode_row(row: Row) -> Tokens:
        return {
            f"{which}_ids": encode_chat(tokenizer, [*row["prompt"], *row[which]])
            for which in ("chosen", "rejected")
        }

    return _within(
        max_length, encoded(rows, on_error, encode_row), lambda tokens: max(map(len, tokens.values()))
    )


def prompts(rows: Sequence[Row], tokenizer: Any, max_length: int, on_error: OnError) -> Examples:
    """`prompt_ids`, ready to be answered."""
    return _within(
        max_length,
        encoded(rows, on_error, lambda row: {"prompt_ids": encode_prompt(tokenizer, row["prompt"])}),
        lambda tokens: len(tokens["prompt_ids"]),
    )


def _split(tokenizer: Any, prompt: list[Message], answer: list[Message]) -> tuple[list[int], int]:
    """The tokens of prompt and answer up to the one that stops it, and where the answer begins among them."""
    context = [message | {"weight": 0} if message["role"] == "assistant" else message for message in prompt]
    found = encode(tokenizer, [*context, *answer])
    learnt = [at for at, mask in enumerate(found.loss_mask) if mask]
    return found.input_ids[: learnt[-1] + 1], learnt[0]


def _within(
    max_length: int, found: Iterable[tuple[Row, Tokens]], length: Callable[[Tokens], int]
) -> Examples:
    """Those of at most `max_length` tokens; the log counts the others. Raises DataError if none is left."""
    found = list(found)
    kept = [(row, tokens) for row, tokens in found if length(tokens) <= max_length]
    if len(kept) < len(found):
        log.warning(
            "%d of %d rows are longer than max_length %d and are left out: raise it to learn from them",
            len(found) - len(kept), len(found), max_length,
        )  # fmt: skip
    if found and not kept:
        raise DataError(f"no row is within max_length {max_length}: raise it")
    return Examples([row for row, _ in kept], [tokens for _, tokens in kept])
