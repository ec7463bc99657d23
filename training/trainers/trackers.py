"""Writes a run's numbers to TensorBoard and to the experiment trackers that the job names.

It calls the libraries directly: accelerate's trackers mark a failed run as finished, and use MLflow's global run.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol, Self

from torch.utils.tensorboard import SummaryWriter

from training.config import AdapterJob, JobConfig
from training.runs import processes
from training.runs.run import Run

log = logging.getLogger(__name__)

_PROJECT = "xinglin"
_MLFLOW_RUN = "mlflow_run_id"
_NOT_IN_MLFLOW_NAMES = re.compile(r"[^\w/.\- :]")
_SECONDS_TO_FINISH = 60
# Values set by the user stay.
_ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",  # sent to wandb's makers, as MLflow's telemetry to MLflow's
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # training waits for the retries, by default for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class _Tracker(Protocol):
    """One tracker's record of the run. Its methods may raise any exception."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, is_whole: bool) -> None: ...


class Boards:
    """Writes a run's numbers to all its boards. With several processes, only the leader has boards.

    A tracker that fails is logged once and then dropped; it never ends a run.
    """

    def __init__(self, config: JobConfig | AdapterJob, run: Run) -> None:
        self._config = config
        self._run = run
        self._tensorboard: SummaryWriter | None = None
        self._trackers: dict[str, _Tracker] = {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics after `step` steps."""
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(step, metrics)
            except Exception as error:
                _tell(name, error)
                del self._trackers[name]
                with suppress(Exception):
                    tracker.close(is_whole=False)

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            if processes.leads():
                self._tensorboard = opened.enter_context(SummaryWriter(self._run.folder / "tensorboard"))
                for name, value in _ENVIRONMENT.items():
                    os.environ.setdefault(name, value)
                settings = _flat(self._config.model_dump(mode="json"))
                for name in self._config.report_to:
                    try:
                        self._trackers[name] = _TRACKERS[name](self._run, settings)
                    except Exception as error:
                        _tell(name, error)
                    opened.push(partial(self._close, name))
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def _close(self, name: str, kind: type[BaseException] | None, *_: object) -> None:
        tracker = self._trackers.pop(name, None)
        if tracker is not None:
            try:
                tracker.close(is_whole=kind is None)
            except Exception as error:
                _tell(name, error)


class _Wandb:
    """Keeps its files in the run's folder; `wandb sync` there uploads what could not be sent."""

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.id,
            name=run.id,
            resume="allow",
            dir=run.folder,
            config=settings,
            # Only the numbers: terminal output and code may hold secrets.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                finish_timeout=_SECONDS_TO_FINISH,
                finish_timeout_raises=True,
            ),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, is_whole: bool) -> None:
        self._run.finish(exit_code=0 if is_whole else 1)


class _Trackio:
    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        self._run = import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=run.id,
            resume="allow",
            config=settings,
            private=True,  # applies if it creates a Space
            embed=False,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, is_whole: bool) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        mlflow = import_module("mlflow")
        self._entities = import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        kept = run.folder / _MLFLOW_RUN
        if kept.exists():
            self._id = kept.read_text(encoding="utf-8")
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        self._id = self._client.create_run(experiment_id, run_name=run.id).info.run_id
        params = [self._entities.Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self._id, params=params)
        kept.write_text(self._id, encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        found = [
            self._entities.Metric(_NOT_IN_MLFLOW_NAMES.sub("_", name), value, now, step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self._id, metrics=found)

    def close(self, is_whole: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_whole else "FAILED")


_TRACKERS: dict[str, Callable[[Run, dict[str, Any]], _Tracker]] = {
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}


def _tell(name: str, error: Exception) -> None:
    log.warning(
        "%s failed and gets no more numbers of this run, which continues; see events.jsonl or TensorBoard: %s: %s",
        name, type(error).__name__, " ".join(str(error).split()),
    )  # fmt: skip


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten `lora: {r: 8}` to `lora.r: 8`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat
