import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training import processes
from tests.training.jobs import SFT, LoadJob, load_job, run_job
from training import __main__ as command
from training.config import STAGES, dump_config
from training.runs.events import (
    Cancelled,
    Checkpoint,
    Evaluation,
    Event,
    EventLog,
    Failed,
    Progress,
    Published,
    Resumed,
    Started,
    Stopped,
    Succeeded,
    read_events,
)
from training.runs.execute import carry_out


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return command.main()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Six runs: succeeded, failed, cancelled, stopped, killed and not started."""
    ends: dict[str, list[Event]] = {
        "1-good": [Published(ref="doctor@0123456789ab", alias="default"), Succeeded()],
        "2-bad": [Failed(error="ValueError: no", traceback="Traceback …")],
        "3-interrupted": [Cancelled()],
        "4-stopped": [Checkpoint(step=8, folder="checkpoints/checkpoint-8"), Stopped(step=8)],
        "5-killed": [Evaluation(step=8, metrics={"eval_loss": 2.0}), Resumed(step=5)],
    }
    (tmp_path / "runs" / "6-begun").mkdir(parents=True)
    (tmp_path / "runs" / "no-run").touch()
    for run_id, end in ends.items():
        (tmp_path / "runs" / run_id).mkdir(parents=True)
        with EventLog(tmp_path / "runs" / run_id / "events.jsonl") as log:
            log.write(Started(run_id=run_id, stage="sft", name="doctor"))
            log.write(Progress(step=7, max_steps=9, eta_seconds=1, metrics={"loss": 0.123456}))
            for event in end:
                log.write(event)
    return tmp_path


@pytest.mark.parametrize("module", ["__main__", "config", "runs.events"])
def test_light_modules_load_no_machine_learning(module: str) -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'tensorboard'}"
    code = f"import training.{module}, sys; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_help_lists_commands_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "--help")
    assert left.value.code == 0
    told = capsys.readouterr().out
    for word in ("run", "resume", "demo", "list", "show"):
        assert f"python -m training {word}" in told
    for code in (0, 1, 2, 75, 130):
        assert f"\n  {code:<4} " in told


def test_list_shows_every_run(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list", "--data-dir", data_dir) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [(run_id, " ".join(rest.split())) for run_id, rest in lines] == [
        ("1-good", "succeeded doctor@0123456789ab"),
        ("2-bad", "failed"),
        ("3-interrupted", "cancelled"),
        ("4-stopped", "stopped"),
        ("5-killed", "killed, step 7 of 9"),
        ("6-begun", "not started"),
    ]


def test_list_distinguishes_a_running_from_a_killed_run(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (data_dir / "runs" / "5-killed" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(monkeypatch, "list", "--data-dir", data_dir) == 0
    assert "running, step 7 of 9" in capsys.readouterr().out
    assert call(monkeypatch, "list", "--data-dir", data_dir) == 0
    assert "killed, step 7 of 9" in capsys.readouterr().out


def test_list_changes_nothing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(data_dir.rglob("*"))
    assert call(monkeypatch, "list", "--data-dir", data_dir) == 0
    assert sorted(data_dir.rglob("*")) == before


def test_list_is_empty_without_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list", "--data-dir", tmp_path / "none") == 0
    assert capsys.readouterr().out == ""


def test_show_prints_every_event(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "show", "1-good", "--data-dir", data_dir) == 0
    told = capsys.readouterr().out
    assert "progress step 7 of 9  loss 0.1235" in told
    assert "published doctor@0123456789ab, alias default" in told
    assert call(monkeypatch, "show", "2-bad", "--data-dir", data_dir) == 0
    assert "failed: ValueError: no\nTraceback …" in capsys.readouterr().out
    assert call(monkeypatch, "show", "4-stopped", "--data-dir", data_dir) == 0
    told = capsys.readouterr().out
    assert "checkpoint checkpoints/checkpoint-8" in told
    assert "stopped at step 8" in told
    assert call(monkeypatch, "show", "5-killed", "--data-dir", data_dir) == 0
    told = capsys.readouterr().out
    assert "evaluation at step 8  eval_loss 2" in told
    assert "resumed at step 5" in told


@pytest.mark.parametrize("what", ["show", "resume"])
def test_an_unknown_run_is_an_error(
    what: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, what, "5", "--data-dir", data_dir) == 2
    assert "no run 5 in" in capsys.readouterr().err


def test_a_bad_config_prints_one_line_and_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text("stage: nothing\n")
    assert call(monkeypatch, "run", tmp_path / "job.yaml", "--data-dir", tmp_path) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'job.yaml'}: stage: must be one of {', '.join(STAGES)}\n"


def test_a_failed_run_prints_one_line_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "build_demo", lambda data_dir: 1 / 0)
    assert call(monkeypatch, "demo", "--data-dir", tmp_path) == 1
    assert capsys.readouterr().err == "failed: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_cancels_the_run(
    asked: signal.Signals, load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = SimpleNamespace(train=lambda *_: signal.raise_signal(asked))
    monkeypatch.setattr("training.runs.execute._load_stage", lambda name: stage)
    (tmp_path / "job.yaml").write_text(dump_config(load_sft()))
    assert call(monkeypatch, "run", tmp_path / "job.yaml", "--data-dir", tmp_path) == 130
    (path,) = tmp_path.glob("runs/*/events.jsonl")
    assert isinstance(read_events(path)[-1], Cancelled)


def is_training(data_dir: Path) -> bool:
    files = data_dir.glob("runs/*/events.jsonl")
    return any(isinstance(event, Progress) for file in files for event in read_events(file))


@pytest.fixture(scope="module")
def job(tiny_dir: Path) -> Any:
    """A job long enough to be stopped at its first step."""
    return load_job(tiny_dir, SFT, epochs=2, max_steps=None, lora={"r": 4, "lora_dropout": 0.2})


@pytest.fixture(scope="module")
def whole(job: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ref that the job publishes without interruption."""
    return run_job(job, tmp_path_factory.mktemp("whole")).ref


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_at_a_checkpoint_and_it_can_be_resumed(
    asked: signal.Signals,
    job: Any,
    whole: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "job.yaml").write_text(dump_config(job))
    with monkeypatch.context() as patch:
        signals_at_first_progress(patch, asked)
        assert call(patch, "run", tmp_path / "job.yaml", "--data-dir", tmp_path) == 75
    (path,) = tmp_path.glob("runs/*/events.jsonl")
    *_, checkpoint, stopped = read_events(path)
    assert isinstance(checkpoint, Checkpoint)
    assert isinstance(stopped, Stopped)
    assert checkpoint.step == stopped.step < 12
    assert not list(tmp_path.glob("store/doctor/revisions/*"))
    run_id = path.parent.name
    told = capsys.readouterr().err.splitlines()[-1]
    expected = f"stopped at step {stopped.step} of 12: continue with `python -m training resume {run_id}`"
    assert told == expected

    assert call(monkeypatch, "resume", run_id, "--data-dir", tmp_path) == 0
    assert f"published {whole}, and doctor@canary points at it" in capsys.readouterr().out
    (resumed,) = [event for event in read_events(path) if isinstance(event, Resumed)]
    assert resumed.step == stopped.step
    assert call(monkeypatch, "resume", run_id, "--data-dir", tmp_path) == 2
    assert f"{run_id} has already succeeded: nothing to resume" in capsys.readouterr().err


def test_a_second_interrupt_ends_a_run_at_once(
    job: Any, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text(dump_config(job))
    with monkeypatch.context() as patch:
        signals_at_first_progress(patch, signal.SIGINT, signal.SIGINT)
        assert call(patch, "run", tmp_path / "job.yaml", "--data-dir", tmp_path) == 130
    (path,) = tmp_path.glob("runs/*/events.jsonl")
    assert isinstance(read_events(path)[-1], Cancelled)
    assert not any(isinstance(event, Checkpoint) for event in read_events(path))
    assert "Traceback" not in capsys.readouterr().err
    assert carry_out(path.parent.name, tmp_path).ref == whole


def signals_at_first_progress(monkeypatch: pytest.MonkeyPatch, *asked: signal.Signals) -> None:
    def write(self: EventLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, Progress) and left:
            for _ in range(len(left)):
                signal.raise_signal(left.pop())

    left, real = list(asked), EventLog.write
    monkeypatch.setattr(EventLog, "write", write)


def test_a_process_exits_with_75_soon_after_sigterm(job: Any, tmp_path: Path) -> None:
    """Until then, no other process can resume the run."""
    (tmp_path / "job.yaml").write_text(dump_config(job.model_copy(update={"epochs": 10_000})))
    told = tmp_path / "told"
    process = processes.start("run", tmp_path / "job.yaml", "--data-dir", tmp_path, told=told)
    while not is_training(tmp_path):
        assert process.is_alive(), told.read_text()
        time.sleep(0.1)
    (folder,) = (tmp_path / "runs").iterdir()
    other = processes.start("resume", folder.name, "--data-dir", tmp_path, told=tmp_path / "other")
    other.join()
    assert other.exitcode == 1
    assert f"{folder.name} is running: another process is working on it" in (tmp_path / "other").read_text()
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75, told.read_text()
    assert "Traceback" not in told.read_text()
    assert isinstance(read_events(folder / "events.jsonl")[-1], Stopped)
    assert not (tmp_path / "store" / "doctor").exists()


def test_the_data_directory_comes_from_the_environment(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XINGLIN_DATA_DIR", str(data_dir))
    assert call(monkeypatch, "list") == 0
    assert "1-good" in capsys.readouterr().out
