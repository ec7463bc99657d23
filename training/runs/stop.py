"""Stop requests: on a signal, the training loop stops after its current step with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.runs import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 75
"""Exit code of a process that stopped at a checkpoint: EX_TEMPFAIL of sysexits.h, on which schedulers may retry."""


class Stopped(Exception):
    """A run stopped on request, at a checkpoint."""


class Stop:
    """Whether a run was requested to stop."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Defer signals to the end of the step; a second Ctrl-C raises KeyboardInterrupt at once.

        Under a launcher a second Ctrl-C is deferred too: there, one Ctrl-C arrives from both terminal and launcher.
        """
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked and number == signal.SIGINT and processes.count() == 1:
            raise KeyboardInterrupt
        self.is_asked = True
