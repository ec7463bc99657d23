"""The numbers of a run on TensorBoard and in trackers: fakes, and MLflow itself if it is installed."""

import logging
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adapters import AdapterStore
from tests.training.jobs import BASE, LoadJob, load_job, run_job
from training.config import fields
from training.errors import ConfigError
from training.runs.events import Checkpoint, Evaluation, Event, EventLog, Failed, Succeeded, read_events
from training.runs.execute import begin, carry_out
from training.runs.run import Run
from training.trainers import trackers as boards
from training.trainers.trackers import Boards

Numbers = dict[tuple[str, int], float]


class Tracker:
    """A fake wandb or trackio that records its calls."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.numbers: Numbers = {}
        self.finished: list[dict[str, Any]] = []
        self.fails_at: str | None = None

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 - as wandb calls it
        return settings

    def init(self, **how: Any) -> "Tracker":
        self.begun.append(how)
        self.fail("init")
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.fail(f"log {step}")
        self.numbers |= {(name, step): value for name, value in metrics.items()}

    def finish(self, **how: Any) -> None:
        self.finished.append(how)
        self.fail("finish")

    def fail(self, moment: str) -> None:
        if moment == self.fails_at:
            raise ConnectionError("no network")


class Mlflow:
    """A fake of mlflow, mlflow.entities and a client that records the runs of one experiment."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}

    def MlflowClient(self) -> "Mlflow":  # noqa: N802 - as mlflow calls it
        return self

    def Param(self, name: str, value: str) -> tuple[str, str]:  # noqa: N802 - as mlflow calls it
        return name, value

    def Metric(self, name: str, value: float, at: int, step: int) -> SimpleNamespace:  # noqa: N802 - as mlflow calls it
        return SimpleNamespace(name=name, value=value, timestamp=at, step=step)

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id=name) if self.runs else None

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
        info = SimpleNamespace(
            run_id=f"{experiment_id}-{len(self.runs)}", run_name=run_name, status="RUNNING"
        )
        data = SimpleNamespace(params={}, metrics={})
        self.runs[info.run_id] = SimpleNamespace(info=info, data=data)
        return self.runs[info.run_id]

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].info.status = status

    set_terminated = update_run

    def log_batch(self, run_id: str, params: Sequence[Any] = (), metrics: Sequence[Any] = ()) -> None:
        data = self.runs[run_id].data
        data.params |= dict(params)
        for metric in metrics:
            data.metrics.setdefault(metric.name, []).append(metric)

    def search_runs(self, experiment_ids: list[str]) -> list[SimpleNamespace]:
        return list(self.runs.values())

    def get_metric_history(self, run_id: str, name: str) -> list[SimpleNamespace]:
        return list(self.runs[run_id].data.metrics[name])


@pytest.fixture(params=["a stand-in", *(["itself"] if find_spec("mlflow") else [])])
def mlflow(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "itself":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
        return import_module("mlflow")
    stand_in = Mlflow()
    monkeypatch.setattr(
        boards, "import_module", {"mlflow": stand_in, "mlflow.entities": stand_in}.__getitem__
    )
    monkeypatch.setattr(fields, "find_spec", lambda name: ModuleSpec(name, None, origin="a test"))
    return stand_in


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tracker]:
    found = {name: Tracker() for name in ("wandb", "trackio")}
    # Not in sys.modules: other libraries would find the fakes there and use functions that they lack.
    monkeypatch.setattr(boards, "import_module", found.__getitem__)
    monkeypatch.setattr(fields, "find_spec", lambda name: ModuleSpec(name, None, origin="a test"))
    return found


def only_folder(data_dir: Path) -> Path:
    (folder,) = (data_dir / "runs").iterdir()
    return folder


def on_tensorboard(folder: Path) -> Numbers:
    numbers: Numbers = {}
    for file in (folder / "tensorboard").iterdir():
        board = EventAccumulator(str(file)).Reload()
        for name in board.Tags()["scalars"]:
            numbers |= {(name, found.step): found.value for found in board.Scalars(name)}
    return numbers


def test_every_tracker_gets_the_numbers_of_tensorboard(
    load_sft: LoadJob, tmp_path: Path, trackers: dict[str, Tracker]
) -> None:
    config = load_sft(report_to=["wandb", "trackio"], evaluate_every=2, general_files=["plain.jsonl"])
    run_job(config, tmp_path)
    folder = only_folder(tmp_path)
    numbers = on_tensorboard(folder)
    assert {("loss", 1), ("eval_loss", 0), ("eval_loss", 2), ("eval_loss", 4)} <= set(numbers)
    assert {("general_loss", 0), ("general_loss", 4)} <= set(numbers)
    for tracker in trackers.values():
        assert tracker.numbers == pytest.approx(numbers)
        (begun,) = tracker.begun
        assert (begun["project"], begun["name"], begun["resume"]) == ("xinglin", folder.name, "allow")
        assert begun["config"]["learning_rate"] == 0.01
        assert begun["config"]["lora.r"] == 16
    assert trackers["wandb"].begun[0]["id"] == folder.name
    assert trackers["wandb"].begun[0]["dir"] == folder
    assert (trackers["wandb"].finished, trackers["trackio"].finished) == ([{"exit_code": 0}], [{}])


def test_stage_scratch_reports_too(tiny_dir: Path, tmp_path: Path, trackers: dict[str, Tracker]) -> None:
    run_job(load_job(tiny_dir, BASE, name="new", steps=10, report_to=["trackio"]), tmp_path)
    assert trackers["trackio"].numbers == pytest.approx(on_tensorboard(only_folder(tmp_path)))
    assert set(trackers["trackio"].numbers) == {("loss", 10), ("learning_rate", 10)}


def test_a_resumed_run_continues_the_trackers_run(
    load_sft: LoadJob, tmp_path: Path, trackers: dict[str, Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    def write(self: EventLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, Checkpoint):
            raise Killed

    real = EventLog.write
    run_id = begin(load_sft(report_to=["wandb"], checkpoint_every=2), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "write", write)
        with pytest.raises(Killed):
            carry_out(run_id, tmp_path)
    assert trackers["wandb"].finished == [{"exit_code": 1}]
    carry_out(run_id, tmp_path)
    assert [begun["id"] for begun in trackers["wandb"].begun] == [run_id, run_id]
    assert trackers["wandb"].finished == [{"exit_code": 1}, {"exit_code": 0}]
    assert {("loss", 1), ("eval_loss", 4)} <= set(trackers["wandb"].numbers)


@pytest.mark.parametrize("moment", ["init", "log 1", "finish"])
def test_a_failing_tracker_is_logged_once_and_ends_no_run(
    moment: str,
    load_sft: LoadJob,
    tmp_path: Path,
    trackers: dict[str, Tracker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trackers["wandb"].fails_at = moment
    run_job(load_sft(report_to=["wandb", "trackio"]), tmp_path)
    assert isinstance(read_events(only_folder(tmp_path) / "events.jsonl")[-1], Succeeded)
    (logged,) = [
        record.getMessage() for record in caplog.records if record.name == "training.trainers.trackers"
    ]
    assert logged.startswith("wandb failed and gets no more numbers of this run, which continues")
    assert logged.endswith("ConnectionError: no network")
    assert trackers["trackio"].numbers == pytest.approx(on_tensorboard(only_folder(tmp_path)))
    if moment == "log 1":
        assert set(trackers["wandb"].numbers) == {
            (name, 0) for name, step in trackers["trackio"].numbers if not step
        }
        assert trackers["wandb"].finished == [{"exit_code": 1}]


def test_all_boards_are_closed_when_training_fails(
    load_sft: LoadJob, tmp_path: Path, trackers: dict[str, Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: EventLog, event: Event) -> None:
        if isinstance(event, Evaluation):
            raise RuntimeError("enough")
        real(self, event)

    real = EventLog.write
    monkeypatch.setattr(EventLog, "write", write)
    with pytest.raises(RuntimeError, match="enough"):
        run_job(load_sft(report_to=["wandb", "trackio"]), tmp_path)
    assert isinstance(read_events(only_folder(tmp_path) / "events.jsonl")[-1], Failed)
    assert (trackers["wandb"].finished, trackers["trackio"].finished) == ([{"exit_code": 1}], [{}])


def test_only_the_leading_process_reports(
    load_sft: LoadJob, tmp_path: Path, trackers: dict[str, Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with EventLog(tmp_path / "events.jsonl") as events:
        run = Run(tmp_path, events, AdapterStore(tmp_path / "store"))
        with Boards(load_sft(report_to=["wandb"]), run) as board:
            board.write(1, {"loss": 1.0})
    assert not trackers["wandb"].begun
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["nothing", "a folder of its files"])
def test_a_tracker_that_is_not_installed_is_refused(
    found: ModuleSpec | None, load_sft: LoadJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match=r"report_to\.0: wandb is not installed: pip install wandb"):
        load_sft(report_to=["wandb"])


def test_a_resumed_run_continues_its_mlflow_run(
    mlflow: Any,
    load_sft: LoadJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = mlflow.MlflowClient()
    caplog.set_level(logging.WARNING)

    class Killed(BaseException): ...

    def write(self: EventLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, Checkpoint):
            raise Killed

    def only_run() -> Any:
        (found,) = client.search_runs([client.get_experiment_by_name("xinglin").experiment_id])
        return found

    real = EventLog.write
    run_id = begin(load_sft(report_to=["mlflow"], checkpoint_every=2), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "write", write)
        with pytest.raises(Killed):
            carry_out(run_id, tmp_path)
    assert only_run().info.status == "FAILED"
    carry_out(run_id, tmp_path)
    run = only_run()
    assert (run.info.run_name, run.info.status) == (run_id, "FINISHED")
    assert (run.data.params["name"], run.data.params["lora.r"]) == ("doctor", "16")
    told = {
        (name, found.step): found.value
        for name in run.data.metrics
        for found in client.get_metric_history(run.info.run_id, name)
    }
    assert told == pytest.approx(on_tensorboard(tmp_path / "runs" / run_id))
    assert not [record for record in caplog.records if record.name == "training.trainers.trackers"]
    with Boards(load_sft(report_to=["mlflow"]), _run(tmp_path / "odd")) as board:
        board.write(1, {"reward_a@b": 1.0, "loss": float("nan")})
    assert not [record for record in caplog.records if record.name == "training.trainers.trackers"]


def _run(folder: Path) -> Run:
    folder.mkdir()
    with EventLog(folder / "events.jsonl") as events:
        return Run(folder, events, AdapterStore(folder / "store"))
