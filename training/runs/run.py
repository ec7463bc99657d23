"""The run that a stage gets with its config: folder, events, store, stop flag and checkpoints."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from adapters import AdapterStore
from training.runs import processes
from training.runs.events import Checkpoint, Evaluation, EventLog, read_events
from training.runs.stop import Stop

CHECKPOINTS = "checkpoints"
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """One execution of a job, possibly resumed."""

    folder: Path
    events: EventLog
    store: AdapterStore
    stop: Stop = field(default_factory=Stop)

    @property
    def id(self) -> str:
        """Id of the run: the name of its folder."""
        return self.folder.name

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.folder / CHECKPOINTS / f"checkpoint-{step}"

    def save_checkpoint(self, step: int, write: Callable[[Path], object], *, kept: int) -> None:
        """Save a checkpoint atomically: `write` fills a temporary folder, which is then renamed.

        Keeps the last `kept` checkpoints. Trainers of libraries save their own checkpoints instead.
        """
        target = self.checkpoint(step)
        half = target.with_name("half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        write(half)
        (half / _STATE).write_text(json.dumps({"global_step": step}))
        half.replace(target)
        self.events.write(Checkpoint(step=step, folder=f"{CHECKPOINTS}/{target.name}"))
        for old in self._checkpoints()[kept:]:
            shutil.rmtree(old)

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint; remove incomplete ones that a kill left."""
        return processes.led(self._last_checkpoint)

    def _last_checkpoint(self) -> Path | None:
        """A checkpoint is complete if it has trainer_state.json, which is written last."""
        for folder in self._checkpoints():
            if _is_whole(folder):
                return folder
            shutil.rmtree(folder)
        return None

    def _checkpoints(self) -> list[Path]:
        """Return all checkpoint folders, newest first."""
        folders = (self.folder / CHECKPOINTS).glob("checkpoint-*")
        return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)

    def steps_done(self) -> int:
        """Return the step of the last checkpoint, 0 without one."""
        checkpoint = self.last_checkpoint()
        return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

    def measured_before(self) -> dict[str, float] | None:
        """Return the metrics of the evaluation before the first step, if this run has recorded it already."""
        return processes.led(self._measured_before)

    def _measured_before(self) -> dict[str, float] | None:
        for event in read_events(self.events.path):
            if isinstance(event, Evaluation) and event.step == 0:
                return event.metrics
        return None


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / _STATE).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True
