"""What a stage gets beside its config: where to write, whom to tell, what there is to go on from."""

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
    """One execution of a job, perhaps resumed."""

    folder: Path
    events: EventLog
    store: AdapterStore
    stop: Stop = field(default_factory=Stop)

    @property
    def id(self) -> str:
        """The name of the run's folder, by which it is listed and resumed."""
        return self.folder.name

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.folder / CHECKPOINTS / f"checkpoint-{step}"

    def save_checkpoint(self, step: int, write: Callable[[Path], object], *, kept: int) -> None:
        """What `write` puts into a folder, whole or not at all: what a kill leaves has another name.

        Of all checkpoints the last `kept` stay. A trainer of a library's writes its own.
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
        """The newest whole checkpoint, after removing what a kill left half written."""
        return processes.led(self._last_checkpoint)

    def _last_checkpoint(self) -> Path | None:
        """trainer_state.json is what a checkpoint gets last."""
        for folder in self._checkpoints():
            if _is_whole(folder):
                return folder
            shutil.rmtree(folder)
        return None

    def _checkpoints(self) -> list[Path]:
        """The newest first."""
        folders = (self.folder / CHECKPOINTS).glob("checkpoint-*")
        return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)

    def steps_done(self) -> int:
        """The steps that need not be done again."""
        checkpoint = self.last_checkpoint()
        return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

    def measured_before(self) -> dict[str, float] | None:
        """What was measured before the first step, if this run was resumed after that."""
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
