import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from adapters import InvalidAdapter
from tests.training.jobs import SFT, LoadJob
from training import job
from training.config import load_config
from training.events import Cancelled, Failed, Progress, Started, read_events
from training.job import run_job


def only_events(data_dir: Path) -> list[Any]:
    (path,) = (data_dir / "runs").glob("*/events.jsonl")
    return read_events(path)


def stage(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(job, "_load_stage", lambda name: SimpleNamespace(run=run))


def test_the_config_is_kept_resolved(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_sft()
    seen = []

    def run(config: object, run_dir: Path, events: object) -> Path:
        seen.append(load_config(run_dir / "config.yaml"))
        raise RuntimeError("enough")

    stage(monkeypatch, run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError):
        run_job(config, Path("data"))
    assert seen == [config]
    assert "doctor" in only_events(tmp_path / "data")[0].run_id


def test_an_error_is_recorded_and_raised(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(monkeypatch, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(load_sft(), tmp_path)
    started, failed = only_events(tmp_path)
    assert isinstance(started, Started)
    assert isinstance(failed, Failed)
    assert failed.error == "ZeroDivisionError: division by zero"
    assert "test_job.py" in failed.traceback


def test_a_result_that_does_not_validate_is_not_published(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: object, run_dir: Path, events: object) -> Path:
        (run_dir / "result").mkdir()
        return run_dir / "result"

    stage(monkeypatch, run)
    with pytest.raises(InvalidAdapter):
        run_job(load_sft(), tmp_path)
    assert isinstance(only_events(tmp_path)[-1], Failed)
    assert not list(tmp_path.glob("store/doctor/*"))


def test_two_runs_begun_in_one_second_have_two_folders(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(monkeypatch, lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            run_job(load_sft(), tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_an_interrupted_run_says_so_and_publishes_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**SFT, "max_steps": 100_000}))
    data_dir = tmp_path / "data"
    command = [sys.executable, "-m", "training", "run", tmp_path / "job.yaml", "--data-dir", data_dir]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, cwd=tiny_dir, env=environment, stderr=subprocess.PIPE, text=True)

    def is_training() -> bool:
        files = data_dir.glob("runs/*/events.jsonl")
        return any(isinstance(event, Progress) for file in files for event in read_events(file))

    while not is_training():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert told.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in told
    assert isinstance(only_events(data_dir)[-1], Cancelled)
    assert not (data_dir / "store").exists()


def test_no_library_telephones_home(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    seen = []
    stage(monkeypatch, lambda *_: seen.append(json.dumps(dict(os.environ))) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(load_sft(), tmp_path)
    assert '"HF_HUB_DISABLE_TELEMETRY": "1"' in seen[0]
