"""Reads data sources into canonical rows, and reports bad rows by file, line and reason."""

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
    """A row with its file and line, for errors that only appear when the chat template is applied."""

    def __init__(self, row: Row, place: str) -> None:
        super().__init__(row)
        self.place = place


def place(row: Row) -> str:
    """Return the file and line of a row."""
    return row.place if isinstance(row, _Placed) else "a row"


def read_chats(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Read rows of `messages` that end with the assistant; answers with `weight` 0 have no loss.

    Rows keep the order of sources and files; `seed` selects rows of sources whose weight is not a whole number. Raises
    DataError that names every bad row, unless `on_error` allows to skip that many.
    """
    return _read(sources, on_error, seed, lambda found: [_chat(found)])


def read_documents(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Read rows of `text` or `messages`, for pre-training. Otherwise like `read_chats`."""
    return _read(sources, on_error, seed, lambda found: [to_document(found)])


def read_preferences(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Read rows of `prompt`, `chosen` and `rejected`, each a list of messages. Otherwise like `read_chats`."""
    return _read(sources, on_error, seed, lambda found: [to_preference(found)])


def read_feedback(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Read rows of `prompt`, `completion` and `label` (true for good). Otherwise like `read_chats`."""
    return _read(sources, on_error, seed, to_feedback)


def read_prompts(sources: Sequence[Source], on_error: OnError = _STOP, seed: int = 0) -> list[Row]:
    """Read rows of `prompt` and, if the data has an answer, `reference`. Otherwise like `read_chats`."""
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
                "a pair of a better and a worse answer: use it with stage rm, dpo, kto or orpo"
            ) from reason
        raise


def _fields(value: object) -> Row:
    """Return the keys of a row that have a value, in lower case unless two keys would collide.

    Parquet gives every row all keys, pandas writes missing values as NaN, and spreadsheets capitalize keys.
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
    """Raise DataError if there are more bad rows than may be skipped; otherwise log the skipped rows."""
    if not problems:
        return
    told = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        told.append(f"... and {len(problems) - _SHOWN} more")
    if on_error.action == "skip" and len(problems) <= on_error.limit:
        for problem in told:
            log.warning("skipped: %s", problem)
        return
    many = f"{len(problems)} bad row{'s' * (len(problems) > 1)}"
    if on_error.action == "skip":
        many += f", but on_error allows to skip only {on_error.limit}"
    raise DataError(
        "\n".join([
            f"{many}: fix them, or set `on_error: {{action: skip, limit: {len(problems)}}}` "
            "to train without them",
            *told,
        ])
    )  # fmt: skip


def _weigh(rows: list[Row], weight: float, seed: str) -> list[Row]:
    """Return the rows repeated by `weight`; the fractional part selects rows at random."""
    times, left = divmod(max(1, round(len(rows) * weight)), len(rows))
    chosen = random.Random(seed).sample(range(len(rows)), left)  # noqa: S311 - sampling, not a secret
    return rows * times + [rows[at] for at in sorted(chosen)]
