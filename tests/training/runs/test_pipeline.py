import json
import logging
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from adapters import AdapterRef, AdapterStore
from tests.training import processes
from tests.training.jobs import SFT, load_job, run_job
from tests.training.pipelines import JOBS, change, lay_out, runs, write
from training.errors import ConfigError, JobFailed
from training.runs import execute as job
from training.runs import pipeline
from training.runs.events import EVENTS_FILE, EventLog, Failed, Published, Succeeded, read_events
from training.runs.execute import carry_out
from training.runs.pipeline import is_pipeline, run_pipeline

Ask = Callable[..., list[str]]


class Killed(BaseException):
    """Stands for a kill: nothing catches it, so nothing cleans up."""


@pytest.fixture(scope="module")
def adapter(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result folder of a real run, without the digest of its weights, so that tests may change them."""
    data_dir = tmp_path_factory.mktemp("adapter")
    run_job(load_job(tiny_dir, SFT, max_steps=1, evaluation_files=[]), data_dir)
    (result,) = data_dir.glob("runs/*/result")
    provenance = json.loads((result / "provenance.json").read_text())
    (result / "provenance.json").write_text(json.dumps({**provenance, "weights_digest": None}))
    return result


@pytest.fixture
def data_dir(tiny_dir: Path, tmp_path: Path) -> Path:
    return lay_out(tmp_path / "data", tiny_dir)


@pytest.fixture
def trained(tiny_dir: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that ran, with a fake stage that is fast and whose result depends on the data."""
    names: list[str] = []

    def run(config: Any, run: Any) -> Path:
        names.append(config.name)
        result: Path = run.folder / "result"
        if config.stage == "scratch":
            return shutil.copytree(tiny_dir / "models" / "tiny", result)
        shutil.copytree(adapter, result)
        data = b"".join(file.read_bytes() for source in config.train_files for file in source.files)
        weights = load_file(result / "adapter_model.safetensors")
        some = zlib.crc32(data + f"{config.name} {config.seed}".encode()) / 2**32
        save_file({k: v * (1 + some) for k, v in weights.items()}, result / "adapter_model.safetensors")
        return result

    monkeypatch.setattr(job, "_load_stage", lambda stage: SimpleNamespace(train=run))
    return names


@pytest.fixture
def ask(data_dir: Path, trained: list[str]) -> Ask:
    """Run the pipeline; return the names of the jobs that trained."""

    def ask() -> list[str]:
        trained.clear()
        run_pipeline(data_dir / "pipeline.yaml", data_dir, root=data_dir)
        return list(trained)

    return ask


def test_jobs_run_in_order_and_are_published(data_dir: Path, trained: list[str]) -> None:
    base, doctor, leaflet, better = run_pipeline(data_dir / "pipeline.yaml", data_dir, root=data_dir)
    assert trained == ["new", "doctor", "leaflet", "better"]
    assert base == "models/new"
    store = AdapterStore(data_dir / "store")
    for name, ref in (("doctor", doctor), ("leaflet", leaflet), ("better", better)):
        assert store.get(AdapterRef.parse(ref)).name == name
    notes = {
        path.stem: json.loads(path.read_text()) for path in (data_dir / "pipelines" / "all").glob("*.json")
    }
    assert {name: note["ref"] for name, note in notes.items()} == {
        "base": base, "doctor": doctor, "leaflet": leaflet, "better": better,
    }  # fmt: skip


def test_up_to_date_results_are_kept(ask: Ask) -> None:
    assert ask() == ["new", "doctor", "leaflet", "better"]
    assert ask() == []


def test_each_job_is_logged_when_it_starts(
    data_dir: Path, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "training")
    ask()
    change(data_dir / "leaflet.yaml", seed=5)
    caplog.clear()
    ask()
    made = ": up to date"
    assert [told for told in caplog.messages if told.startswith("[")] == [
        f"[1 of 4] new (stage scratch){made}",
        f"[2 of 4] doctor (stage sft){made}",
        f"[4 of 4] better (stage dpo){made}",
        "[3 of 4] leaflet (stage sft)",
    ]


def test_paths_may_be_relative(data_dir: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_dir)
    run_pipeline(Path("pipeline.yaml"), Path("../data"))
    assert len(trained) == 4
    monkeypatch.chdir(data_dir.parent)
    run_pipeline(data_dir / "pipeline.yaml", Path("data"), root=data_dir)
    assert len(trained) == 4


@pytest.mark.parametrize(
    ("what", "redone"),
    [
        ("heldout.jsonl", ["doctor", "leaflet", "better"]),
        ("doctor.jsonl", ["new", "doctor", "leaflet", "better"]),
        ("pairs.jsonl", ["better"]),
        ("base.yaml", ["new", "doctor", "leaflet", "better"]),
        ("doctor.yaml", ["doctor", "better"]),
        ("leaflet.yaml", ["leaflet"]),
        ("better.yaml", ["better"]),
        ("pipeline.yaml", []),
    ],
)
def test_a_change_reruns_the_job_and_its_dependents_only(
    what: str, redone: list[str], data_dir: Path, ask: Ask
) -> None:
    ask()
    path = data_dir / what
    last = path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + ("# a comment\n" if path.suffix == ".yaml" else f"{last}\n"))
    assert ask() == redone
    assert ask() == []


@pytest.mark.parametrize("held", ["evaluation_files", "general_files"])
def test_a_file_that_moves_to_another_role_is_a_change(held: str, data_dir: Path, ask: Ask) -> None:
    for role, names in (("train", "ab"), ("held", "c")):
        (data_dir / role).mkdir()
        for name in names:
            (data_dir / role / f"{name}.jsonl").write_text("{}\n")
    change(data_dir / "leaflet.yaml", train_files=["train"], **{held: ["held"]})
    ask()
    (data_dir / "train" / "b.jsonl").rename(data_dir / "held" / "b.jsonl")
    assert ask() == ["leaflet"]


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        ("pipelines/all/leaflet.json", ["leaflet"]),
        ("store/doctor", ["doctor"]),
        ("models/new/config.json", ["new"]),
    ],
)
def test_lost_results_are_made_again(data_dir: Path, ask: Ask, lost: str, redone: list[str]) -> None:
    ask()
    (data_dir / lost).rename(data_dir / "lost")
    assert ask() == redone
    assert ask() == []


def test_a_foreign_base_model_is_not_touched(tiny_dir: Path, data_dir: Path, ask: Ask) -> None:
    theirs = shutil.copytree(tiny_dir / "models" / "tiny", data_dir / "models" / "new")
    (theirs / "theirs").touch()
    with pytest.raises(JobFailed, match=r"base\.yaml did not succeed: .*there is a base model"):
        ask()
    assert (theirs / "theirs").exists()


def test_a_fixed_revision_is_not_a_dependency(data_dir: Path, ask: Ask) -> None:
    ask()
    store = AdapterStore(data_dir / "store")
    change(data_dir / "better.yaml", policy=f"doctor@{store.aliases('doctor')['default']}")
    assert ask() == ["better"]
    change(data_dir / "doctor.yaml", seed=1)
    assert ask() == ["doctor"]


def test_a_reward_adapter_is_a_dependency(data_dir: Path, adapter: Path, ask: Ask) -> None:
    store = AdapterStore(data_dir / "store")
    for name in ("elsewhere", "a-third"):
        revision = store.publish(adapter, name, actor="test").revision
        store.set_alias(name, "default", revision, actor="test")
    change(
        data_dir / "better.yaml",
        stage="ppo",
        policy="elsewhere",
        reward=["leaflet@canary", "a-third"],
        steps=1,
    )
    ask()
    change(data_dir / "leaflet.yaml", seed=1)
    assert ask() == ["leaflet", "better"]


# Killed, stopped, failed


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Any], *, after: bool) -> None:
    """Raise Killed just before or after the run of job `name` writes an event."""

    def write(self: EventLog, event: Any) -> None:
        is_time = isinstance(event, kind) and f"-{name}-" in str(self.path)
        if is_time and not after:
            raise Killed
        real(self, event)
        if is_time:
            raise Killed

    real = EventLog.write
    monkeypatch.setattr(EventLog, "write", write)


@pytest.mark.parametrize("name", ["new", "doctor", "better"])
@pytest.mark.parametrize(
    ("kind", "after", "again"),
    [
        (Published, False, True),
        (Published, True, True),
        (Succeeded, True, False),
    ],
    ids=["published", "told", "succeeded"],
)
def test_after_a_kill_the_next_call_continues_the_unfinished_run(
    name: str,
    kind: type[Any],
    after: bool,
    again: bool,
    data_dir: Path,
    ask: Ask,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, name, kind, after=after)
        with pytest.raises(Killed):
            ask()
    order = ["new", "doctor", "leaflet", "better"]
    assert trained == order[: order.index(name) + 1]
    # A published base model is complete; publishing an adapter twice gives one revision.
    begun_again = [name] if again and name != "new" else []
    assert ask() == begun_again + order[order.index(name) + 1 :]
    assert runs(data_dir) == 4
    assert ask() == []


def test_a_kill_before_the_note_is_written_starts_a_new_run(
    data_dir: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "replace_text", killed)
        with pytest.raises(Killed):
            ask()
    assert ask() == ["new", "doctor", "leaflet", "better"]


def test_a_run_resumed_by_hand_is_used(data_dir: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "doctor", Published, after=False)
        with pytest.raises(Killed):
            ask()
    (run,) = (data_dir / "runs").glob("*-doctor-*")
    carry_out(run.name, data_dir)
    assert ask() == ["leaflet", "better"]


def test_a_job_that_changed_since_the_kill_starts_a_new_run(
    data_dir: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "new", Published, after=False)
        with pytest.raises(Killed):
            ask()
    change(data_dir / "base.yaml", seed=1)
    assert ask() == ["new", "doctor", "leaflet", "better"]
    assert runs(data_dir) == 5


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_failed_job_is_named_with_its_run_and_retried(
    parallel: int,
    data_dir: Path,
    tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With real stages, which cannot read the data."""
    monkeypatch.setattr(pipeline, "_PROCESSES", processes.FORKED)
    shutil.copytree(tiny_dir / "models", data_dir / "models")
    (data_dir / "plain.jsonl").write_text('{"text": 5}\n')
    change(data_dir / "leaflet.yaml", base_model="models/tiny")
    path = write(data_dir, jobs=["leaflet.yaml"], parallel=parallel)
    with pytest.raises(JobFailed) as caught:
        run_pipeline(path, data_dir, root=data_dir)
    (run,) = (data_dir / "runs").iterdir()
    assert f"leaflet.yaml did not succeed (run {run.name}): " in str(caught.value)
    if parallel == 1:
        assert "plain.jsonl:1: " in str(caught.value)
    last = read_events(run / EVENTS_FILE)[-1]
    assert isinstance(last, Failed)
    assert "plain.jsonl:1: " in last.error
    with pytest.raises(JobFailed, match=run.name):
        run_pipeline(path, data_dir, root=data_dir)


def test_a_second_call_waits_for_the_first(
    data_dir: Path, ask: Ask, trained: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "training")
    ask()
    with pipeline._locked(data_dir / "pipelines" / "all"):
        second = threading.Thread(target=ask)
        second.start()
        while "waiting: another process is running pipeline all" not in caplog.messages:
            time.sleep(0.01)
        change(data_dir / "better.yaml", seed=1)
        assert trained == []
    second.join()


# Invalid pipelines


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pipeline": "../up"}, "pipeline.yaml: pipeline: '../up' cannot name"),
        ({"jobs": []}, "pipeline.yaml: jobs: must have at least 1 entry"),
        ({"parallel": 0}, "pipeline.yaml: parallel: must be at least 1"),
        ({"serial": 1}, "pipeline.yaml: serial: no such setting"),
        ({"jobs": ["none.yaml"]}, "none.yaml: cannot be read: No such file"),
        ({"jobs": ["base.yaml", "x/base.yaml"]}, "pipeline.yaml: jobs: files need distinct names: base"),
        ({"jobs": ["doctor.yaml", "base.yaml"]}, "doctor.yaml depends on base.yaml: list base.yaml first"),
        (
            {"jobs": ["base.yaml", "better.yaml", "doctor.yaml"]},
            "better.yaml depends on doctor.yaml: list doctor.yaml first",
        ),
        ({"jobs": ["bad.yaml"]}, "bad.yaml: steps: is missing"),
        (
            {"jobs": ["base.yaml", "leaflet.yaml", "stale.yaml"]},
            "stale.yaml: depends on leaflet@default, but leaflet.yaml moves canary: "
            "set its publish.alias to default",
        ),
    ],
)
def test_an_invalid_pipeline_is_refused_before_any_job_starts(
    changes: dict[str, Any], complaint: str, data_dir: Path, trained: list[str]
) -> None:
    (data_dir / "bad.yaml").write_text("stage: scratch\nname: bad\ntrain_files: [plain.jsonl]\n")
    (data_dir / "stale.yaml").write_text(yaml.safe_dump({**JOBS["better"], "policy": "leaflet"}))
    with pytest.raises(ConfigError) as caught:
        run_pipeline(write(data_dir, **changes), data_dir, root=data_dir)
    assert complaint in str(caught.value)
    assert trained == []
    assert not (data_dir / "runs").exists()


def test_a_job_is_not_a_pipeline(data_dir: Path) -> None:
    assert is_pipeline(data_dir / "pipeline.yaml")
    assert not is_pipeline(data_dir / "base.yaml")
