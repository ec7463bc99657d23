"""Data files of any accepted format in, canonical rows out; every bad row is named by file, line and reason.

`files` reads the containers, `chats` and `preferences` recognise the formats row by row, `reading` puts them
together for each kind of stage, `overlap` compares what is trained on with what is evaluated on.

Canonical rows, as plain dictionaries:

    chat        {"messages": [...]}: perhaps a system message, then user and assistant in turns; `weight` 0 on
                an answer means that it is context and not learnt
    document    {"text": "…"}
    preference  {"prompt": [...], "chosen": [...], "rejected": [...]}: messages up to the user's last, and one
                message of the assistant each
    feedback    {"prompt": [...], "completion": [...], "label": true}
    prompt      {"prompt": [...], "reference": "…"}: the reference only where the data has an answer
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
"""How data files are read, by the kind of rows that a stage asks for."""

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
