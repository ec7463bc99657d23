"""Progress of a run: a bar on a terminal, otherwise a line every few seconds."""

import logging
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5

_place = 0


def stand_at(place: int) -> None:
    """Draw the bar on this line of the terminal, for parallel jobs."""
    global _place  # noqa: PLW0603 - there is one terminal
    _place = place


def show_lines(level: int = logging.INFO) -> None:
    """Log to stderr: from this package at `level` and above, from other packages only warnings and above."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("training").setLevel(level)
    # On CPUs with AVX512-BF16 it recommends a package that only speeds up inference, which training does not need.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class Meter:
    """Shows steps, speed, loss and remaining time of a training loop."""

    def __init__(self, title: str, max_steps: int, first_step: int = 0) -> None:
        self.max_steps = max_steps
        self._title = title
        self._first_step = self._step = first_step
        self._loss = ""
        self._began = self._told = time.monotonic()
        bar = tqdm(
            desc=title, total=max_steps, initial=first_step, unit="step", disable=None, position=_place
        )
        self._bar = None if bar.disable else bar  # disabled where stderr is not a terminal

    def eta_seconds(self) -> float:
        """Return the remaining seconds at the average speed so far; 0.0 before the first step."""
        done = self._step - self._first_step
        elapsed = time.monotonic() - self._began
        return elapsed / done * (self.max_steps - self._step) if done else 0.0

    def update(self, step: int, loss: float | None = None) -> None:
        """Show that `step` steps are done; without `loss`, the last one stays."""
        if loss is not None:
            self._loss = f"{loss:.3f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {self._loss}" if self._loss else "", refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._bar is None and time.monotonic() - self._told > _SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            speed = (step - self._first_step) / (self._told - self._began)
            log.info(
                "%s: step %d of %d, %s%.1f steps/s, %.0f s left",
                self._title, step, self.max_steps, f"loss {self._loss}, " if self._loss else "", speed,
                self.eta_seconds(),
            )  # fmt: skip

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()
