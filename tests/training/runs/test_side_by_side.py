"""Pipelines whose jobs run in parallel, each in its own process."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training import processes
from tests.training.jobs import SFT
from tests.training.pipelines import change, lay_out, runs, write
from training.errors import JobFailed
from training.runs import pipeline
from training.runs.events import Progress, Resumed, Stopped, Succeeded, read_events
from training.runs.pipeline import run_pipeline
from training.runs.stop import Stopped as RunStopped


@pytest.fixture
def data_dir(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pipeline, "_PROCESSES", processes.FORKED)  # they start within a second instead of ten
    return lay_out(tmp_path / "data", tiny_dir)


STEPS = 300
JOBS = ["base.yaml", "doctor.yaml", "leaflet.yaml"]


def ask_for(data_dir: Path, **changes: Any) -> Path:
    """A pipeline of a base and two adapters that train for a few seconds each."""
    for name in ("doctor", "leaflet"):
        change(data_dir / f"{name}.yaml", max_steps=STEPS, checkpoint_every=2 * STEPS)
    return write(data_dir, **{"jobs": JOBS, "parallel": 2, **changes})


@pytest.fixture(scope="module")
def in_turn(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The refs of that pipeline, run without interruption and one job at a time."""
    data_dir = lay_out(tmp_path_factory.mktemp("in-turn") / "data", tiny_dir)
    return run_pipeline(ask_for(data_dir, parallel=1), data_dir, root=data_dir)


def events(data_dir: Path, name: str) -> list[Any]:
    return [event for path in data_dir.glob(f"runs/*-{name}-*/events.jsonl") for event in read_events(path)]


def are_training(data_dir: Path, *names: str) -> bool:
    return all(any(isinstance(event, Progress) for event in events(data_dir, name)) for name in names)


def test_interrupted_parallel_jobs_stop_at_checkpoints_and_have_the_same_results(
    data_dir: Path, in_turn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ask_for(data_dir)
    monkeypatch.setattr(pipeline, "_PROCESSES", processes.together())

    def interrupt() -> None:
        while not are_training(data_dir, "doctor", "leaflet"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(RunStopped, match="a checkpoint of every running job"):
        run_pipeline(path, data_dir, root=data_dir)
    stopped = [events(data_dir, name)[-1] for name in ("doctor", "leaflet")]
    assert all(isinstance(event, Stopped) and event.step < STEPS for event in stopped)

    assert run_pipeline(path, data_dir, root=data_dir) == in_turn
    for name, event in zip(("doctor", "leaflet"), stopped, strict=True):
        assert [one.step for one in events(data_dir, name) if isinstance(one, Resumed)] == [event.step]
    assert runs(data_dir) == 3


def test_jobs_of_a_killed_pipeline_stop_and_the_next_call_resumes_them(
    data_dir: Path, in_turn: list[str]
) -> None:
    """In real processes, which import everything."""
    run_pipeline(ask_for(data_dir, jobs=JOBS[:1], parallel=1), data_dir, root=data_dir)
    path = ask_for(data_dir)
    told = data_dir / "told"
    first = processes.start("run", path, "--data-dir", data_dir, told=told, cwd=data_dir)
    while not are_training(data_dir, "doctor", "leaflet"):
        assert first.is_alive(), told.read_text()
        time.sleep(0.05)
    first.kill()
    first.join()
    assert run_pipeline(path, data_dir, root=data_dir) == in_turn
    for name in ("doctor", "leaflet"):
        (resumed,) = [event for event in events(data_dir, name) if isinstance(event, Resumed)]
        assert resumed.step > 0
    assert runs(data_dir) == 3


def test_when_one_job_fails_the_others_stop_at_a_checkpoint(tiny_dir: Path, data_dir: Path) -> None:
    shutil.copytree(tiny_dir / "models", data_dir / "models")
    change(data_dir / "leaflet.yaml", base_model="models/tiny", max_steps=100_000, checkpoint_every=100_000)
    change(data_dir / "doctor.yaml", base_model="models/tiny", max_steps=1)
    (data_dir / "bad.jsonl").write_text('{"text": 5}\n')
    bad = {
        **SFT,
        "name": "bad",
        "base_model": "models/tiny",
        "adapter": "doctor",
        "train_files": ["bad.jsonl"],
    }
    (data_dir / "bad.yaml").write_text(yaml.safe_dump(bad))
    path = write(data_dir, jobs=["leaflet.yaml", "doctor.yaml", "bad.yaml"], parallel=2)
    with pytest.raises(JobFailed, match=r"bad\.yaml did not succeed \(run .*-bad-.*\): exit code 1"):
        run_pipeline(path, data_dir, root=data_dir)
    assert isinstance(events(data_dir, "leaflet")[-1], Stopped)
    assert isinstance(events(data_dir, "doctor")[-1], Succeeded)
    (folder,) = (data_dir / "runs").glob("*-leaflet-*")
    assert len(list(folder.glob("checkpoints/checkpoint-*"))) == 1
