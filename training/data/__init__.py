"""Reads data files of all accepted formats into canonical rows, and reports bad rows by file, line and reason.

`files` reads the file formats, `chats` and `preferences` detect the format of each row, `reading` combines them for
each kind of stage, and `overlap` compares training rows with evaluation rows.

Canonical rows, as plain dictionaries:

    chat        {"messages": [...]}: an optional system message, then user and assistant in turns; an answer with
                `weight` 0 is context without loss
    document    {"text": "…"}
    preference  {"prompt": [...], "chosen": [...], "rejected": [...]}: messages up to the last user message, and one
                assistant message each
    feedback    {"prompt": [...], "completion": [...], "label": true}
    prompt      {"prompt": [...], "reference": "…"}: the reference only if the data has an answer
"""

from collections.abc import Callable, Sequence

from training.config import OnError, Rows, Source
from training.data.chats import Row
from training.data.overlap import Report, report
from training.data.reading import (
    judge,
    place,
    read_chats,
    read_documents,
    read_feedback,
    read_preferences,
    read_prompts,
)

READERS: dict[Rows, Callable[[Sequence[Source], OnError, int], list[Row]]] = {
    "documents": read_documents,
    "chats": read_chats,
    "preferences": read_preferences,
    "feedback": read_feedback,
    "prompts": read_prompts,
}
"""Reader of data files for each kind of rows."""

__all__ = [
    "READERS",
    "Report",
    "Row",
    "judge",
    "place",
    "read_chats",
    "read_documents",
    "read_feedback",
    "read_preferences",
    "read_prompts",
    "report",
]
