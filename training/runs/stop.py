"""Being told to stop: a training loop ends at its next step, with a checkpoint to go on from."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.runs import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 75
"""Of a process that stopped at a checkpoint: EX_TEMPFAIL of sysexits.h, after which schedulers may start the work
again."""


class Stopped(Exception):
    """A run was told to stop, and did so at a checkpoint."""


class Stop:
    """Whether somebody has asked a run to stop."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals wait for the next step; a second Ctrl-C does not, and raises KeyboardInterrupt at once.

        Under a launcher it waits, too: one Ctrl-C comes twice there, from the terminal and from the launcher.
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
