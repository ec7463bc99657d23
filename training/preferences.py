"""Preference and feedback rows as the trainers take them."""

from typing import Any

from datasets import Dataset

from training.data import Row
from training.lengths import within

_ANSWERS = ("chosen", "rejected", "completion")


def dataset(rows: list[Row], tokenizer: Any, max_length: int) -> Dataset:
    """Rows of at most `max_length` tokens. Raises DataError if none is left."""

    def length(row: Row) -> int:
        answers = [row[which] for which in _ANSWERS if which in row]
        return max(
            len(tokenizer.apply_chat_template([*row["prompt"], *answer], return_dict=False))
            for answer in answers
        )

    return Dataset.from_list(within(max_length, rows, length))


def answerable(rows: list[Row], tokenizer: Any, max_length: int) -> list[Row]:
    """Rows whose prompt is at most `max_length` tokens. Raises DataError if none is left."""
    return within(
        max_length,
        rows,
        lambda row: len(
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ),
    )


def prompts_of(rows: list[Row]) -> list[Row]:
    """The prompts of any rows, as chats without an answer to learn."""
    return [{"messages": [*row["prompt"], {"role": "assistant", "content": ""}]} for row in rows]
