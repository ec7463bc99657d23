"""Tokenizes rows for the trainers, in the same way for all stages and as the service does.

Each function skips rows that the chat template refuses, if the job allows it (`on_error`), and rows longer than
`max_length`, since a truncated row would teach something else. The remaining rows are kept with their tokens, because
golden prompts are sampled from them.
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
"""The fields of one row for a trainer: lists of token ids by name, and other values that the stage needs."""


@dataclass(frozen=True)
class Examples:
    """Training rows and the tokens of each."""

    rows: list[Row]
    tokens: list[Tokens]

    def dataset(self) -> Dataset | None:
        """Return the tokens as a dataset for trainers; None without rows."""
        return Dataset.from_list(self.tokens) if self.tokens else None


def encoded(
    rows: Sequence[Row], on_error: OnError, encode_row: Callable[[Row], Tokens]
) -> list[tuple[Row, Tokens]]:
    """Return each row with its tokens.

    Raises DataError that names the rows the template refuses, unless `on_error` skips them.
    """
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
    """Return `prompt_ids`, `chosen_ids` and `rejected_ids`; answers end with their stop token."""

    def encode_row(row: Row) -> Tokens:
        chosen, rejected = (_split(tokenizer, row["prompt"], row[which]) for which in ("chosen", "rejected"))
        # The template may open the two answers differently: their common beginning is the prompt.
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
    """Return `prompt_ids`, `completion_ids` and `label`."""

    def encode_row(row: Row) -> Tokens:
        ids, begin = _split(tokenizer, row["prompt"], row["completion"])
        return {"prompt_ids": ids[:begin], "completion_ids": ids[begin:], "label": row["label"]}

    return _within(
        max_length,
        encoded(rows, on_error, encode_row),
        lambda tokens: len(tokens["prompt_ids"]) + len(tokens["completion_ids"]),
    )


def conversations(rows: Sequence[Row], tokenizer: Any, max_length: int, on_error: OnError) -> Examples:
    """Return `chosen_ids` and `rejected_ids`: whole conversations, as a reward model scores them."""

    def encode_row(row: Row) -> Tokens:
        return {
            f"{which}_ids": encode_chat(tokenizer, [*row["prompt"], *row[which]])
            for which in ("chosen", "rejected")
        }

    return _within(
        max_length, encoded(rows, on_error, encode_row), lambda tokens: max(map(len, tokens.values()))
    )


def prompts(rows: Sequence[Row], tokenizer: Any, max_length: int, on_error: OnError) -> Examples:
    """Return `prompt_ids`, including the opening of the assistant's turn."""
    return _within(
        max_length,
        encoded(rows, on_error, lambda row: {"prompt_ids": encode_prompt(tokenizer, row["prompt"])}),
        lambda tokens: len(tokens["prompt_ids"]),
    )


def _split(tokenizer: Any, prompt: list[Message], answer: list[Message]) -> tuple[list[int], int]:
    """Return the tokens of prompt and answer up to the stop token, and the index where the answer begins."""
    context = [message | {"weight": 0} if message["role"] == "assistant" else message for message in prompt]
    found = encode(tokenizer, [*context, *answer])
    learnt = [at for at, mask in enumerate(found.loss_mask) if mask]
    return found.input_ids[: learnt[-1] + 1], learnt[0]


def _within(
    max_length: int, found: Iterable[tuple[Row, Tokens]], length: Callable[[Tokens], int]
) -> Examples:
    """Keep rows of at most `max_length` tokens; log how many were skipped. Raises DataError if none is left."""
    found = list(found)
    kept = [(row, tokens) for row, tokens in found if length(tokens) <= max_length]
    if len(kept) < len(found):
        log.warning(
            "skipped %d of %d rows longer than max_length %d: raise it to train on them",
            len(found) - len(kept), len(found), max_length,
        )  # fmt: skip
    if found and not kept:
        raise DataError(f"all rows are longer than max_length {max_length}: raise it")
    return Examples([row for row, _ in kept], [tokens for _, tokens in kept])
