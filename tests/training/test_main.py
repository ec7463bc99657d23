import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.training.jobs import LoadJob
from training import __main__ as command
from training.config import dump_config
from training.events import Cancelled, EventLog, Failed, Progress, Published, Started, Succeeded, read_events


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        return command.main()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Four runs: one that succeeded, failed, was cancelled, and is under way."""
    ends = {
        "1-good": [Published(ref="doctor@0123456789ab", alias="default"), Succeeded()],
        "2-bad": [Failed(error="ValueError: no", traceback="Traceback …")],
        "3-stopped": [Cancelled()],
        "4-now": [],
    }
    for run_id, end in ends.items():
        (tmp_path / "runs" / run_id).mkdir(parents=True)
        with EventLog(tmp_path / "runs" / run_id / "events.jsonl") as log:
            log.write(Started(run_id=run_id, stage="sft", name="doctor"))
            log.write(Progress(step=7, max_steps=9, eta_seconds=1, metrics={"loss": 0.123456}))
            for event in end:
                log.write(event)
    return tmp_path


@pytest.mark.parametrize("module", ["__main__", "config", "events"])
def test_light_modules_load_no_machine_learning(module: str) -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'tensorboard'}"
    code = f"import training.{module}, sys; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "--help")
    assert left.value.code == 0
    told = capsys.readouterr().out
    for word in ("run", "demo", "list", "show"):
        assert f"python -m training {word}" in told


def test_list_shows_every_run(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list", "--data-dir", data_dir) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [(run_id, " ".join(rest.split())) for run_id, rest in lines] == [
        ("1-good", "succeeded doctor@0123456789ab"),
        ("2-bad", "failed"),
        ("3-stopped", "cancelled"),
        ("4-now", "running or killed, step 7 of 9"),
    ]


def test_show_tells_every_event(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "show", "1-good", "--data-dir", data_dir) == 0
    told = capsys.readouterr().out
    assert "progress step 7 of 9  loss 0.1235" in told
    assert "published doctor@0123456789ab, alias default" in told
    assert call(monkeypatch, "show", "2-bad", "--data-dir", data_dir) == 0
    assert "failed: ValueError: no\nTraceback …" in capsys.readouterr().out


def test_an_unknown_run_is_an_error_that_says_where_to_look(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "show", "5", "--data-dir", data_dir) == 2
    assert "there is no run 5 in" in capsys.readouterr().err


def test_a_bad_config_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text("stage: nothing\n")
    assert call(monkeypatch, "run", tmp_path / "job.yaml", "--data-dir", tmp_path) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'job.yaml'}: stage: give one of pt, sft\n"


def test_a_failed_run_is_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "build_demo", lambda data_dir: 1 / 0)
    assert call(monkeypatch, "demo", "--data-dir", tmp_path) == 1
    assert capsys.readouterr().err == "failed: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_is_cancelled(
    asked: signal.Signals, load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = SimpleNamespace(run=lambda *_: signal.raise_signal(asked))
    monkeypatch.setattr("training.job._load_stage", lambda name: stage)
    (tmp_path / "job.yaml").write_text(dump_config(load_sft()))
    assert call(monkeypatch, "run", tmp_path / "job.yaml", "--data-dir", tmp_path) == 130
    (path,) = tmp_path.glob("runs/*/events.jsonl")
    assert isinstance(read_events(path)[-1], Cancelled)


def test_the_data_directory_comes_from_the_environment(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XINGLIN_DATA_DIR", str(data_dir))
    assert call(monkeypatch, "list") == 0
    assert "1-good" in capsys.readouterr().out
