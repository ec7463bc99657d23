"""Runs every shipped config, and every complete job in the docs, on a tiny base for a few steps.

The configs are read unchanged. A fixture provides what they name: the tiny model as the base model, the adapters they
continue from, and some rows of the demo's data. Only the settings that decide how long a run takes are changed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import pytest
import yaml

import training
from adapters import AdapterRef, AdapterStore
from tests.training.jobs import SFT, load_job, run_job
from tests.training.judges import Judge, running_judge
from training.config import load_config
from training.demo.corpus import write_corpus

ROOT = Path(training.__file__).parents[1]
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
DOCUMENTS = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("en/*.md")])
DATA_DIR = Path("xinglin-data")
ROWS = 24


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.M | re.S)


def jobs_in(document: Path) -> list[dict[str, Any]]:
    """The YAML blocks that are complete jobs; other blocks show only some settings."""
    found = [yaml.safe_load(block) for block in blocks(document, "yaml")]
    return [block for block in found if isinstance(block, dict) and "stage" in block]


JOBS = [pytest.param(yaml.safe_load(path.read_text()), id=path.name) for path in CONFIGS] + [
    pytest.param(job, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    for number, job in enumerate(jobs_in(document), start=1)
]


@pytest.fixture(scope="module")
def named_there(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the configs name: base model, adapters, data, and functions from the docs."""
    folder = tmp_path_factory.mktemp("shipped") / "here"
    copytree(tiny_dir / "models" / "tiny", folder / "Qwen" / "Qwen3-0.6B")
    data_dir = folder / DATA_DIR
    write_corpus(data_dir / "demo")
    for file in (data_dir / "demo").iterdir():
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:ROWS]))
    copytree(tiny_dir / "models", data_dir / "models")
    copytree(tiny_dir / "models" / "tiny", data_dir / "models" / "xinglin-demo")
    copy(data_dir / "demo" / "leaflet.jsonl", folder / "mine.jsonl")
    for name, files, changes in (
        ("my-doctor", "doctor", {"max_steps": 2}),
        ("my-doctor-rm", "pairs", {"stage": "rm", "golden": None, "max_steps": 8}),
    ):
        settings = {
            **SFT, "name": name, "train_files": [f"demo/{files}.jsonl"], "publish": {"alias": "default"},
            "evaluation_files": [f"demo/{files}_heldout.jsonl"], **changes,
        }  # fmt: skip
        settings = {setting: value for setting, value in settings.items() if value is not None}
        run_job(load_job(data_dir, settings), data_dir)
    for document in DOCUMENTS:
        for block in blocks(document, "python"):
            if module := re.match(r"# (\w+\.py)\b", block):
                (folder / module[1]).write_text(block)
    return folder


@pytest.fixture
def here(named_there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current directory, where `python -m training` looks for functions."""
    folder = copytree(named_there, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with running_judge(lambda told: "7") as judge:
        yield judge


def shortened(job: dict[str, Any]) -> dict[str, Any]:
    """The job, shortened to two small steps."""
    stage = job["stage"]
    asked = {**job, "threads": 1, "batch_size": 4}
    if stage == "scratch":
        return {**asked, "steps": 2, "model": {**job["model"], "vocab_size": 512}}
    asked = {**asked, "max_length": 256}
    if stage in ("ppo", "grpo"):
        asked |= {"steps": 2, "max_new_tokens": 8}
    else:
        asked.pop("epochs", None)
        asked["max_steps"] = 2
    if stage == "ppo":
        asked |= {"minibatch_size": 2, "min_reward_accuracy": 0}
    if stage != "rm":
        asked["golden"] = {"prompts": 8, "max_new_tokens": 8}
    return asked


def judged_by(job: dict[str, Any], judge: Judge) -> dict[str, Any]:
    if not isinstance(job.get("reward"), list):
        return job
    rewards = [{**one, "judge": judge.url} if "judge" in one else one for one in job["reward"]]
    return {**job, "reward": rewards}


@pytest.mark.parametrize("job", JOBS)
def test_the_job_publishes_its_adapter_or_base(job: dict[str, Any], here: Path, judge: Judge) -> None:
    path = here / "job.yaml"
    path.write_text(yaml.safe_dump(judged_by(shortened(job), judge)))
    published = run_job(load_config(path), DATA_DIR)
    if job["stage"] == "scratch" or job.get("merge") or job.get("full"):
        assert published.ref == f"models/{job['name']}"
        assert (DATA_DIR / published.ref / "model.safetensors").is_file()
        return
    manifest = AdapterStore(DATA_DIR / "store").get(AdapterRef.parse(job["name"]))
    assert published.ref == f"{job['name']}@{manifest.revision}"
    assert manifest.stage == job["stage"]
    parts = [reward for reward in job.get("reward", []) if isinstance(reward, dict)]
    if any("judge" in reward for reward in parts):
        assert judge.asked
        assert manifest.metrics["eval_reward_judge_3"] == 7


def test_there_are_jobs_in_the_documents() -> None:
    assert any(jobs_in(document) for document in DOCUMENTS)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "en").glob("*.md")), ids=lambda page: page.stem)
def test_both_languages_show_the_same_jobs(page: Path) -> None:
    assert jobs_in(ROOT / "docs" / "zh" / page.name) == jobs_in(page)
