import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml

from adapters import AdapterRef, AdapterStore
from training.demo import build
from training.demo.build import build_demo

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's jobs with two steps each, on a model of one layer."""
    folder = tmp_path_factory.mktemp("configs")
    for job in build.JOBS:
        config = yaml.safe_load((build.CONFIGS / f"{job}.yaml").read_text())
        if config["stage"] == "pt":
            config |= {"steps": 2, "model": {"num_hidden_layers": 1, "hidden_size": 64}}
        else:
            config |= {"max_steps": 2, "evaluation_files": [], "golden": {"prompts": 8, "max_new_tokens": 2}}
        (folder / f"{job}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def built(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("built") / "data"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(build, "CONFIGS", configs)
        build_demo(data_dir)
    return data_dir


@pytest.fixture
def data_dir(built: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished demo that a test may damage."""
    monkeypatch.setattr(build, "CONFIGS", configs)
    return copytree(built, tmp_path / "data")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the jobs that are really run."""
    names: list[str] = []

    def run_job(config: Any, data_dir: Path) -> Any:
        names.append(config.name)
        return real(config, data_dir)

    real = build.run_job
    monkeypatch.setattr(build, "run_job", run_job)
    return names


def is_whole(data_dir: Path) -> bool:
    store = AdapterStore(data_dir / "store")
    adapters = [store.get(AdapterRef.parse(f"{name}@default")) for name in ("doctor", "leaflet")]
    return (data_dir / "models" / "xinglin-demo" / "model.safetensors").exists() and len(adapters) == 2


def test_the_demo_makes_a_base_and_two_adapters(built: Path) -> None:
    assert is_whole(built)
    assert {path.name for path in (built / "demo").glob("*.jsonl")} >= {
        "chat.jsonl",
        "doctor.jsonl",
        "leaflet.jsonl",
    }


def test_done_work_is_not_done_again(data_dir: Path, ran: list[str]) -> None:
    build_demo(data_dir)
    assert ran == []


def test_a_relative_data_directory_will_do(
    data_dir: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_dir.parent)
    build_demo(Path("data"))
    assert ran == []


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        ("demo/leaflet.made.json", ["leaflet"]),
        ("store/doctor", ["doctor"]),
        ("models/xinglin-demo/config.json", ["xinglin-demo"]),
    ],
)
def test_what_is_lost_is_made_again(data_dir: Path, ran: list[str], lost: str, redone: list[str]) -> None:
    (data_dir / lost).rename(data_dir / "lost")
    build_demo(data_dir)
    assert ran == redone
    assert is_whole(data_dir)


def test_a_torn_note_counts_as_none(data_dir: Path, ran: list[str]) -> None:
    note = data_dir / "demo" / "doctor.made.json"
    note.write_text(note.read_text()[:10])
    build_demo(data_dir)
    assert ran == ["doctor"]


def test_another_config_of_an_adapter_rebuilds_that_adapter(
    data_dir: Path, ran: list[str], configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = copytree(configs, tmp_path / "changed")
    (changed / "doctor.yaml").write_text((configs / "doctor.yaml").read_text() + "seed: 5\n")
    monkeypatch.setattr(build, "CONFIGS", changed)
    before = AdapterStore(data_dir / "store").aliases("doctor")
    build_demo(data_dir)
    assert ran == ["doctor"]
    assert AdapterStore(data_dir / "store").aliases("doctor") != before


def test_another_corpus_rebuilds_all(data_dir: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def write_other_corpus(folder: Path) -> None:
        text = (folder / "documents.jsonl").read_text()
        (folder / "documents.jsonl").write_text(text + '{"text": "one more"}\n')

    monkeypatch.setattr(build, "write_corpus", write_other_corpus)
    build_demo(data_dir)
    assert ran == ["xinglin-demo", "doctor", "leaflet"]
    assert is_whole(data_dir)


def test_a_run_that_fails_leaves_its_job_to_be_done(
    data_dir: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_dir / "demo" / "doctor.made.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("training.job._load_stage", lambda stage: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_demo(data_dir)
    build_demo(data_dir)
    assert ran == ["doctor", "doctor"]


def test_killed_at_any_step_the_next_call_finishes_the_work(
    configs: Path, tmp_path: Path, ran: list[str]
) -> None:
    """Killed while it trains the base, then while it trains an adapter, in one process after another."""
    code = (
        "import sys, pathlib, training.demo.build as b; b.CONFIGS = pathlib.Path(sys.argv[1]); "
        "b.build_demo(pathlib.Path(sys.argv[2]))"
    )
    data_dir = tmp_path / "data"
    for under_way in ("xinglin-demo", "doctor"):
        process = subprocess.Popen(
            [sys.executable, "-c", code, configs, data_dir], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        while not list(data_dir.glob(f"runs/*-{under_way}-*/tensorboard")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CONFIGS", configs)
        build_demo(data_dir)
    assert ran[-1] == "leaflet"
    assert is_whole(data_dir)
