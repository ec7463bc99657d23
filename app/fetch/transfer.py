"""What every way of fetching shares: which files an adapter is made of, limits, progress, clear errors."""

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
"""A transfer may take hours, but not without a byte for this long."""

_REPORT_SECONDS = 0.2


class TransferFailed(Exception):
    """A transfer that cannot succeed. The message goes to the client as it is."""


@dataclass
class Transfer:
    """One adapter on its way: where to, how much of it is there, and how much it may be."""

    folder: Path
    """Where the files of the adapter go; there, and empty."""
    staging: Path
    """Where anything else goes; removed in the end."""
    max_bytes: int
    report: Callable[[int, int | None], None]
    """Is told bytes done and bytes in all, where known."""
    total: int | None = None
    done: int = 0
    _reported_at: float = field(default=0.0, init=False)

    def expect(self, total: int | None) -> None:
        """Say how much it will be. Raises TransferFailed when that is too much."""
        if total is not None and total > self.max_bytes:
            raise self._too_large(total)
        self.total = total
        self.report(self.done, self.total)

    def add(self, count: int) -> None:
        """Count bytes that arrived; below zero for what is thrown away. Raises TransferFailed when too many."""
        self.done += count
        if self.done > self.max_bytes:
            raise self._too_large(self.done)
        now = time.monotonic()
        if now > self._reported_at + _REPORT_SECONDS or self.done == self.total:
            self._reported_at = now
            self.report(self.done, self.total)

    def _too_large(self, found: int) -> TransferFailed:
        return TransferFailed(
            f"the source is larger than the {self.max_bytes} bytes allowed (at least {found}): start the "
            "service with a larger XINGLIN_MAX_ADAPTER_GIB"
        )


def wanted(names: set[str]) -> list[str]:
    """Those of `names` that an adapter is made of. Raises TransferFailed when it is none."""
    if WEIGHTS not in names and PICKLED_WEIGHTS in names:
        raise TransferFailed(
            f"the source has its weights only as {PICKLED_WEIGHTS}, which is a program as well as data: save "
            "it as safetensors: python -m training convert-adapter"
        )
    missing = [name for name in ADAPTER_FILES[:2] if name not in names]
    if missing:
        raise TransferFailed(f"the source holds no adapter: there is no {' and no '.join(missing)} in it")
    return [name for name in ADAPTER_FILES if name in names]
