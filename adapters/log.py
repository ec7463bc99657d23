"""The append-only log of one adapter: every change with time and actor, and the rollback order derived from it."""

import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

Action = Literal["publish", "point", "rollback", "promote", "unpoint", "split", "prune"]


class LogEntry(BaseModel):
    """One line of an adapter's log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    action: Action
    actor: str
    alias: str | None = None
    from_revision: str | None = None
    to_revision: str | None = None
    percent: float | None = None
    """Split only: the alias's new share of the requests."""
    source: str | None = None
    """Publish only: the source of the files, if not a folder."""
    why: str = ""


def read_log(path: Path) -> list[LogEntry]:
    """Return all entries, oldest first. Skips a line torn by a crash."""
    # Bytes, since a crash may tear a character, and U+2028 and others also end a line of text.
    lines = path.read_bytes().splitlines() if path.exists() else []
    entries = []
    for line in lines:
        try:
            entries.append(LogEntry.model_validate_json(line))
        except ValidationError:
            continue
    return entries


def append(path: Path, entry: LogEntry) -> None:
    """Append one entry and sync it to disk."""
    line = entry.model_dump_json() + "\n"
    with path.open("a+", encoding="utf-8") as file:
        # A line torn by a crash must not swallow this one.
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            line = "\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def way_back(entries: Iterable[LogEntry], alias: str, current: str) -> list[str]:
    """Return the revisions that `alias` can be rolled back to, most recent first.

    A rollback undoes moves and does not count as one, so two in a row go back two steps. A crash may have logged a move
    that never happened: the next entry, or the alias itself, shows where the alias really pointed.
    """
    path: tuple[str, ...] = ()
    before = path
    for entry in entries:
        if entry.alias != alias or entry.action == "split":
            continue
        came_from = (entry.from_revision,) if entry.from_revision else ()
        if path[-1:] != came_from:
            path = before if before[-1:] == came_from else came_from
        before = path
        if entry.to_revision is None:
            path = ()
        elif entry.action == "rollback" and entry.to_revision in path[:-1]:
            last = max(i for i, revision in enumerate(path[:-1]) if revision == entry.to_revision)
            path = path[: last + 1]
        else:
            path = (*path, entry.to_revision)
    if path[-1:] != (current,):
        path = before
    return list(reversed(path[:-1]))
