"""Shared by all kinds of transfers: the files of an adapter, limits, progress and errors."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
ADAPTER_FILES = (
    "adapter_config.json",
    WEIGHTS,
    "chat_template.jinja",
    "golden.jsonl",
    "provenance.json",
    "manifest.json",
)

CONNECT_SECONDS = 10
SILENCE_SECONDS = 60
"""A transfer may take hours, but fails after this long without data."""

_REPORT_SECONDS = 0.2


class TransferFailed(Exception):
    """A transfer cannot succeed. The client reads the message unchanged."""


@dataclass
class Transfer:
    """The transfer of one adapter: its folders, progress and size limit."""

    folder: Path
    """The folder for the adapter's files; exists and is empty."""
    staging: Path
    """The folder for all other files; removed at the end."""
    max_bytes: int
    report: Callable[[int, int | None], None]
    """Called as (bytes done, total bytes or None) for progress."""
    total: int | None = None
    done: int = 0
    _reported_at: float = field(default=0.0, init=False)

    def expect(self, total: int | None) -> None:
        """Set the total size. Raises TransferFailed if it exceeds the limit."""
        if total is not None and total > self.max_bytes:
            raise self._too_large(total)
        self.total = total
        self.report(self.done, self.total)

    def add(self, count: int) -> None:
        """Count bytes that arrived, negative for discarded ones. Raises TransferFailed above the limit."""
        self.done += count
        if self.done > self.max_bytes:
            raise self._too_large(self.done)
        now = time.monotonic()
        if now > self._reported_at + _REPORT_SECONDS or self.done == self.total:
            self._reported_at = now
            self.report(self.done, self.total)

    def _too_large(self, found: int) -> TransferFailed:
        return TransferFailed(
            f"the source is larger than the {self.max_bytes} bytes allowed (at least {found}): raise "
            "XINGLIN_MAX_ADAPTER_GIB"
        )


def wanted(names: set[str]) -> list[str]:
    """Return those of `names` that belong to an adapter. Raises TransferFailed if required files are missing."""
    if WEIGHTS not in names and PICKLED_WEIGHTS in names:
        raise TransferFailed(
            f"the source has its weights only as {PICKLED_WEIGHTS}, a pickle, which can run code: convert it to "
            "safetensors with python -m training convert-adapter"
        )
    missing = [name for name in ADAPTER_FILES[:2] if name not in names]
    if missing:
        raise TransferFailed(f"the source holds no adapter: it has no {' and no '.join(missing)}")
    return [name for name in ADAPTER_FILES if name in names]
