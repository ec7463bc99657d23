import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters import AdapterRef, AdapterStore, InvalidAdapter
from tests.training import processes
from tests.training.jobs import BASE, SFT, LoadJob, load_job, run_job
from training.config import dump_config, load_config
from training.errors import Busy, ConfigError
from training.runs import execute as job
from training.runs.events import (
    Cancelled,
    Checkpoint,
    EventLog,
    Failed,
    Published,
    Resumed,
    Started,
    Succeeded,
    read_events,
)
from training.runs.execute import begin, carry_out, is_running
from training.runs.stop import Stopped


def only_events(data_dir: Path) -> list[Any]:
    (path,) = (data_dir / "runs").glob("*/events.jsonl")
    return read_events(path)


def stage(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(job, "_load_stage", lambda name: SimpleNamespace(train=run))


@pytest.fixture(scope="module")
def config(tiny_dir: Path) -> Any:
    """Eight steps over an epoch and a third, with every source of randomness."""
    return load_job(tiny_dir, SFT, max_steps=8, checkpoint_every=3, lora={"r": 4, "lora_dropout": 0.2})


@pytest.fixture(scope="module")
def whole(config: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ref that the job publishes without interruption."""
    return run_job(config, tmp_path_factory.mktemp("whole")).ref


def test_the_resolved_config_is_stored(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_sft()
    seen = []

    def run(config: object, run: Any) -> Path:
        seen.append(load_config(run.folder / "config.yaml"))
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
    assert "test_execute.py" in failed.traceback


def test_an_invalid_result_is_not_published(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: object, run: Any) -> Path:
        (run.folder / "result").mkdir()
        return run.folder / "result"  # type: ignore[no-any-return]

    stage(monkeypatch, run)
    with pytest.raises(InvalidAdapter):
        run_job(load_sft(), tmp_path)
    assert isinstance(only_events(tmp_path)[-1], Failed)
    assert not list(tmp_path.glob("store/doctor/*"))


def test_runs_started_in_the_same_second_have_separate_folders(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(monkeypatch, lambda *_: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            run_job(load_sft(), tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_no_library_telephones_home(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    seen = []
    stage(monkeypatch, lambda *_: seen.append(json.dumps(dict(os.environ))) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_job(load_sft(), tmp_path)
    assert '"HF_HUB_DISABLE_TELEMETRY": "1"' in seen[0]


# Runs that were killed, stopped or interrupted


@pytest.mark.parametrize("moment", processes.MOMENTS)
def test_a_run_resumed_after_a_kill_has_the_same_result(
    moment: str, config: Any, whole: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(dump_config(config))
    process = processes.start(
        "run", tmp_path / "job.yaml", "--data-dir", tmp_path, told=tmp_path / "told", killed_at=moment
    )
    process.join()
    assert process.exitcode == -9, (tmp_path / "told").read_text()
    (folder,) = (tmp_path / "runs").iterdir()
    assert not is_running(folder)
    assert carry_out(folder.name, tmp_path).ref == whole

    events = only_events(tmp_path)
    (resumed,) = [event for event in events if isinstance(event, Resumed)]
    before = events[: events.index(resumed)]
    if moment == "half way through a checkpoint":
        assert (resumed.step, before[1].step) == (0, 0)
    else:
        assert resumed.step == max((e.step for e in before if isinstance(e, Checkpoint)), default=0)
    assert isinstance(events[-1], Succeeded)
    store = AdapterStore(tmp_path / "store")
    assert f"doctor@{store.get(AdapterRef.parse('doctor@canary')).revision}" == whole


def test_a_run_that_succeeded_can_be_joined_but_not_resumed(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = begin(load_sft(), tmp_path)
    with EventLog(tmp_path / "runs" / run_id / "events.jsonl") as events:
        events.write(Started(run_id=run_id, stage="sft", name="doctor"))
        events.write(published := Published(ref="doctor@0123456789ab"))
        events.write(Succeeded())
    with pytest.raises(ConfigError, match=f"{run_id} has already succeeded: nothing to resume"):
        carry_out(run_id, tmp_path)
    assert carry_out(run_id, tmp_path, join=True) == published


def test_an_unknown_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run nowhere in"):
        carry_out("nowhere", tmp_path)


def test_one_process_at_a_time_works_on_a_run_and_others_fail_or_wait(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def run(config: object, run: Any) -> Path:
        begun.set()
        assert go_on.wait(30)
        raise Stopped("step 1 of 2")

    stage(monkeypatch, run)
    run_id = begin(load_sft(), tmp_path)
    folder = tmp_path / "runs" / run_id
    assert not is_running(folder)

    ends: list[BaseException] = []

    def work(join: bool) -> None:
        try:
            carry_out(run_id, tmp_path, join=join)
        except Stopped as stopped:
            ends.append(stopped)

    first, second = (threading.Thread(target=work, args=(join,)) for join in (False, True))
    first.start()
    assert begun.wait(30)
    assert is_running(folder)
    with pytest.raises(Busy, match=f"{run_id} is running: another process is working on it"):
        carry_out(run_id, tmp_path)
    second.start()
    time.sleep(0.3)
    assert ends == []
    go_on.set()
    first.join()
    second.join()
    assert len(ends) == 2
    assert not is_running(folder)


def test_is_running_does_not_disturb_a_run(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """is_running holds the lock of a run for an instant."""
    stage(monkeypatch, lambda *_: 1 / 0)
    run_id = begin(load_sft(), tmp_path)
    with pytest.raises(ZeroDivisionError):
        carry_out(run_id, tmp_path)
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            is_running(tmp_path / "runs" / run_id)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(100):
            with pytest.raises(ZeroDivisionError):
                carry_out(run_id, tmp_path)
    finally:
        is_over.set()
        looking.join()


def test_an_interrupted_run_is_cancelled_and_can_be_resumed(
    config: Any, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run_id = begin(config, tmp_path)
    with monkeypatch.context() as patch:
        stage(patch, interrupted)
        with pytest.raises(KeyboardInterrupt):
            carry_out(run_id, tmp_path)
    assert isinstance(only_events(tmp_path)[-1], Cancelled)
    assert carry_out(run_id, tmp_path).ref == whole


# Base models


@pytest.fixture
def base_job(tiny_dir: Path, tmp_path: Path) -> Any:
    return load_job(tiny_dir, BASE, name="new", steps=1)


def test_a_run_killed_after_publishing_its_base_model_succeeds_when_resumed(
    base_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException): ...

    def write(self: EventLog, event: Any) -> None:
        if isinstance(event, Published):
            raise Killed
        real(self, event)

    real = EventLog.write
    run_id = begin(base_job, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "write", write)
        with pytest.raises(Killed):
            carry_out(run_id, tmp_path)
    made = (tmp_path / "models" / "new").stat().st_ino
    stage(monkeypatch, lambda *_: pytest.fail("trained again"))
    assert carry_out(run_id, tmp_path).ref == "models/new"
    assert isinstance(only_events(tmp_path)[-1], Succeeded)
    assert (tmp_path / "models" / "new").stat().st_ino == made


def test_a_resumed_run_does_not_adopt_the_base_model_of_another(
    base_job: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(monkeypatch, lambda *_: 1 / 0)
    run_id = begin(base_job, tmp_path)
    with pytest.raises(ZeroDivisionError):
        carry_out(run_id, tmp_path)
    shutil.copytree(tiny_dir / "models" / "tiny", tmp_path / "models" / "new")
    shutil.copytree(tiny_dir / "models" / "tiny", tmp_path / "runs" / run_id / "result")
    (tmp_path / "models" / "new" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"name: there is a base model .*new already"):
        carry_out(run_id, tmp_path)
    assert (tmp_path / "models" / "new" / "config.json").read_text() == "{}"


def test_the_second_of_two_runs_for_one_base_model_fails(
    base_job: Any, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: object, run: Any) -> Path:
        return Path(shutil.copytree(tiny_dir / "models" / "tiny", run.folder / "result"))

    def slower(config: object, run_: Any) -> Path:
        stage(monkeypatch, run)
        assert carry_out(first, tmp_path).ref == "models/new"
        return run(config, run_)

    first, second = begin(base_job, tmp_path), begin(base_job, tmp_path)
    stage(monkeypatch, slower)
    with pytest.raises(ConfigError, match="there is a base model"):
        carry_out(second, tmp_path)
