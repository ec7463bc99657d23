"""Rows that are too long to be learnt from whole."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from training.data import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")


def within(max_length: int, rows: Sequence[T], length: Callable[[T], int]) -> list[T]:
    """The rows of at most `max_length` tokens; the others are counted in the log, for cut in two they would
    teach something else. Raises DataError if none is left."""
    kept = [row for row in rows if length(row) <= max_length]
    if len(kept) < len(rows):
        log.warning(
            "%d of %d rows are longer than max_length %d and are left out: raise it to learn from them",
            len(rows) - len(kept), len(rows), max_length,
        )  # fmt: skip
    if not kept:
        raise DataError(f"no row is within max_length {max_length}: raise it")
    return kept
