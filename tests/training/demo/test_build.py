import time
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml

from adapters import AdapterRef, AdapterStore
from tests.training.processes import FORKED
from training.config import load_config
from training.demo import build
from training.demo.build import build_demo
from training.errors import JobFailed
from training.runs import pipeline

SMALL: dict[str, dict[str, Any]] = {
    "scratch": {"steps": 2, "model": {"num_hidden_layers": 1, "hidden_size": 64}},
    "sft": {"max_steps": 2, "golden": {"prompts": 8, "max_new_tokens": 2}},
    "rm": {"max_steps": 2, "batch_size": 4},
    "ppo": {
        "steps": 1, "batch_size": 2, "minibatch_size": 2, "max_new_tokens": 2, "min_reward_accuracy": 0,
        "golden": {"prompts": 8, "max_new_tokens": 2},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's pipeline, one job at a time, with one or two steps per job and a model of one layer."""
    folder = tmp_path_factory.mktemp("configs")
    asked = yaml.safe_load(build.PIPELINE.read_text())
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({**asked, "parallel": 1}))
    for job in asked["jobs"]:
        config = yaml.safe_load((build.PIPELINE.parent / job).read_text())
        config |= SMALL[config["stage"]]
        if (
            "evaluation_files" in config and config["stage"] != "rm"
        ):  # stage ppo checks the accuracy of stage rm
            del config["evaluation_files"]
        (folder / job).write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def built(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("built") / "data"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(build, "PIPELINE", configs / "pipeline.yaml")
        build_demo(data_dir)
    return data_dir


@pytest.fixture
def data_dir(built: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished demo that a test may damage."""
    monkeypatch.setattr(build, "PIPELINE", configs / "pipeline.yaml")
    return copytree(built, tmp_path / "data")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that run."""
    names: list[str] = []

    def carry_out(run_id: str, data_dir: Path, **how: Any) -> Any:
        names.append(load_config(data_dir / "runs" / run_id / "config.yaml").name)
        return real(run_id, data_dir, **how)

    real = pipeline.carry_out
    monkeypatch.setattr(pipeline, "carry_out", carry_out)
    return names


ADAPTERS = {"doctor": "chat", "doctor-rm": "reward", "leaflet": "chat", "doctor-ppo": "chat"}


def is_whole(data_dir: Path) -> bool:
    store = AdapterStore(data_dir / "store")
    tasks = {name: store.get(AdapterRef.parse(f"{name}@default")).task for name in ADAPTERS}
    return (data_dir / "models" / "xinglin-demo" / "model.safetensors").exists() and tasks == ADAPTERS


def test_the_demo_makes_a_base_and_adapters_of_every_kind(built: Path) -> None:
    assert is_whole(built)
    assert {path.name for path in (built / "demo").glob("*.jsonl")} >= {
        "chat.jsonl",
        "doctor.jsonl",
        "leaflet.jsonl",
        "pairs.jsonl",
    }


def test_finished_work_is_not_repeated(data_dir: Path, ran: list[str]) -> None:
    build_demo(data_dir)
    assert ran == []


def test_a_relative_data_directory_works(
    data_dir: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_dir.parent)
    build_demo(Path("data"))
    assert ran == []


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        ("pipelines/demo/leaflet.json", ["leaflet"]),
        ("store/doctor", ["doctor"]),
        ("models/xinglin-demo/config.json", ["xinglin-demo"]),
    ],
)
def test_lost_results_are_made_again(data_dir: Path, ran: list[str], lost: str, redone: list[str]) -> None:
    (data_dir / lost).rename(data_dir / "lost")
    build_demo(data_dir)
    assert ran == redone
    assert is_whole(data_dir)


def test_a_truncated_note_counts_as_missing(data_dir: Path, ran: list[str]) -> None:
    note = data_dir / "pipelines" / "demo" / "doctor.json"
    note.write_text(note.read_text()[:10])
    build_demo(data_dir)
    assert ran == ["doctor"]


def test_a_changed_adapter_config_rebuilds_the_adapter_and_its_dependents(
    data_dir: Path, ran: list[str], configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = copytree(configs, tmp_path / "changed")
    (changed / "doctor.yaml").write_text((configs / "doctor.yaml").read_text() + "seed: 5\n")
    monkeypatch.setattr(build, "PIPELINE", changed / "pipeline.yaml")
    before = AdapterStore(data_dir / "store").aliases("doctor")
    build_demo(data_dir)
    assert ran == ["doctor", "doctor-ppo"]
    assert AdapterStore(data_dir / "store").aliases("doctor") != before


def test_a_changed_corpus_rebuilds_everything(
    data_dir: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_other_corpus(folder: Path) -> None:
        text = (folder / "documents.jsonl").read_text()
        (folder / "documents.jsonl").write_text(text + '{"text": "one more"}\n')

    monkeypatch.setattr(build, "write_corpus", write_other_corpus)
    build_demo(data_dir)
    assert ran == ["xinglin-demo", "doctor", "doctor-rm", "leaflet", "doctor-ppo"]
    assert is_whole(data_dir)


def test_the_job_of_a_failed_run_is_run_again(
    data_dir: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_dir / "pipelines" / "demo" / "doctor.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("training.runs.execute._load_stage", lambda stage: 1 / 0)
        with pytest.raises(JobFailed, match=r"doctor\.yaml did not succeed .*ZeroDivisionError"):
            build_demo(data_dir)
    build_demo(data_dir)
    assert ran == ["doctor", "doctor"]


def build_from(pipeline: Path, data_dir: Path) -> None:
    build.PIPELINE = pipeline
    build_demo(data_dir)


def test_after_a_kill_the_next_call_finishes_the_work(
    configs: Path, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill one process while it trains the base, the next while it trains an adapter."""
    monkeypatch.setattr(build, "PIPELINE", configs / "pipeline.yaml")
    data_dir = tmp_path / "data"
    for under_way in ("xinglin-demo", "doctor"):
        process = FORKED.Process(target=build_from, args=(build.PIPELINE, data_dir))
        process.start()
        while not list(data_dir.glob(f"runs/*-{under_way}-*/tensorboard")):
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
    build_demo(data_dir)
    assert ran[-1] == "doctor-ppo"
    assert is_whole(data_dir)
    assert len(list((data_dir / "runs").iterdir())) == 5
