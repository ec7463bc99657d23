"""Data sources in, canonical rows out; every bad row is named by file, line and reason."""

import logging
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from training.config import OnError, Source
from training.data.chats import Row, to_chat, to_document
from training.data.errors import BadRow
from training.data.files import read_values
from training.data.preferences import has_pair, to_feedback, to_preference, to_prompt
from training.errors import DataError

log = logging.getLogger(__name__)

_SHOWN = 20
_STOP = OnError()


class _Placed(dict[str, Any]):
    """A row that knows where it was read, for errors that only its chat template brings to light."""

    def __init__(self, row: Row, place: str) -> None:
        super().__init__(row)
        self.place = place


def place(row: Row) -> str:
    """File and line that a row was read at."""
    return row.place if isinstance(row, _Placed) else "a row"


def read_chats(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Rows of `messages`, ending with the assistant's; an answer of `weight` 0 is not to be learnt.

    Rows come in the order of the sources and files; `seed` chooses those that a weight below 1 leaves.
    Raises DataError naming every bad row, unless told to skip so many.
    """
    return _read(sources, on_error, seed, lambda found: [_chat(found)])


def read_documents(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Rows of `text` or `messages`, for pre-training. Otherwise as `read_chats`."""
    return _read(sources, on_error, seed, lambda found: [to_document(found)])


def read_preferences(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Rows of `prompt`, `chosen` and `rejected`, each a list of messages. Otherwise as `read_chats`."""
    return _read(sources, on_error, seed, lambda found: [to_preference(found)])


def read_feedback(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Rows of `prompt`, `completion` and `label`: whether the completion is good. Otherwise as `read_chats`."""
    return _read(sources, on_error, seed, to_feedback)


def read_prompts(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Rows of `prompt` and, where the data answers it, `reference`. Otherwise as `read_chats`."""
    return _read(sources, on_error, seed, lambda found: [to_prompt(found)])


def _read(
    sources: Sequence[Source], on_error: OnError, seed: int, canonical: Callable[[Row], list[Row]]
) -> list[Row]:
    found: list[list[Row]] = []
    problems: list[str] = []
    for source in sources:
        found.append([])
        for path in source.files:
            for at, value in read_values(path):
                try:
                    found[-1] += [_Placed(row, f"{path.name}:{at}") for row in canonical(_fields(value))]
                except BadRow as reason:
                    problems.append(f"{path.name}:{at}: {reason}")
    judge(problems, on_error)
    rows: list[Row] = []
    for number, (source, of_source) in enumerate(zip(sources, found, strict=True)):
        if not of_source:
            raise DataError(f"no rows in {', '.join(path.name for path in source.files)}")
        rows += _weigh(of_source, source.weight, f"{seed} {number}")
    return rows


def _chat(found: Row) -> Row:
    try:
        return to_chat(found)
    except BadRow as reason:
        if has_pair(found):
            raise BadRow(
                "a better and a worse answer: stages rm, dpo, kto and orpo learn from such"
            ) from reason
        raise


def _fields(value: object) -> Row:
    """The keys of a row that have a value; Parquet gives every row the keys of all, and pandas writes NaN for none.

    Spreadsheets begin them with a capital: here they are of lower case, unless two would be one then.
    """
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow("a row must be a JSON object")
    lower = {str(key).strip().lower() for key in value}
    return {
        str(key).strip().lower() if len(lower) == len(value) else key: item
        for key, item in value.items()
        if item is not None and not (isinstance(item, float) and math.isnan(item))
    }


def judge(problems: list[str], on_error: OnError) -> None:
    """Raises DataError if there are more bad rows than may be skipped, or else tells of those that are."""
    if not problems:
        return
    told = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        told.append(f"... and {len(problems) - _SHOWN} more")
    if on_error.action == "skip" and len(problems) <= on_error.limit:
        for problem in told:
            log.warning("left out: %s", problem)
        return
    many = f"{len(problems)} bad row{'s' * (len(problems) > 1)}"
    if on_error.action == "skip":
        many += f", and at most {on_error.limit} may be skipped"
    raise DataError(
        "\n".join([
            f"{many}: correct them, or set `on_error: {{action: skip, limit: {len(problems)}}}` "
            "to train without them",
            *told,
        ])
    )  # fmt: skip


def _weigh(rows: list[Row], weight: float, seed: str) -> list[Row]:
    """The rows `weight` times: all of them so often as it is whole, and by chance what is left."""
    times, left = divmod(max(1, round(len(rows) * weight)), len(rows))
    chosen = random.Random(seed).sample(range(len(rows)), left)  # noqa: S311 - chance, and no secret
    return rows * times + [rows[at] for at in sorted(chosen)]
