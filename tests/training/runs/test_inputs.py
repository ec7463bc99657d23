"""A resumed run uses the inputs it started with, or reports what has changed."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml

from adapters import AdapterRef, AdapterStore
from tests.adapters.folders import make_folder
from tests.training.jobs import SFT, chats, load_job
from training.config import JobConfig, load_config
from training.demo.corpus import doctor_answer
from training.errors import ConfigError
from training.runs import execute as job
from training.runs.execute import begin, carry_out
from training.runs.inputs import INPUTS_FILE, read_inputs


class Interrupted(Exception):
    """Ends a run."""


class Stage:
    """A stage that trains nothing and records the jobs it gets."""

    def __init__(self) -> None:
        self.given: list[JobConfig] = []

    def train(self, config: JobConfig, _run: Any) -> Path:
        self.given.append(config)
        raise Interrupted


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(job, "_load_stage", lambda _: stage)
    return stage


class Begun:
    """A GRPO job with every kind of input; the fixture starts and interrupts it once."""

    def __init__(self, tiny: Path, folder: Path) -> None:
        self.folder = folder
        copytree(tiny / "models", folder / "models")
        self.data = folder / "train.jsonl"
        self.data.write_text(chats(doctor_answer))
        self.store = AdapterStore(folder / "store")
        self.first = self.publish("doctor", seed=1)
        self.reward = self.publish("judge", seed=2)
        (folder / "our_rewards.py").write_text(
            "def length(conversations):\n    return [1.0 for _ in conversations]\n"
        )
        path = folder / "job.yaml"
        settings = {
            "stage": "grpo",
            "name": "better",
            "base_model": str(folder / "models" / "tiny"),
            "policy": "doctor",
            "reward": [{"adapter": "judge"}, {"function": "our_rewards:length"}],
            "train_files": [str(self.data)],
        }
        path.write_text(yaml.safe_dump({**settings, "learning_rate": 1e-4, "steps": 4}))
        self.run_id = begin(load_config(path), folder)
        self.run = folder / "runs" / self.run_id

    def publish(self, name: str, *, seed: int) -> str:
        revision = self.store.publish(
            make_folder(self.folder / f"{name}{seed}", seed=seed).write(), name, actor="test"
        ).revision
        self.store.set_alias(name, "default", revision, actor="test")
        return f"{name}@{revision}"

    def go(self, *, accept_changes: bool = False) -> None:
        with pytest.raises(Interrupted):
            carry_out(self.run_id, self.folder, accept_changes=accept_changes)


@pytest.fixture
def begun(stage: Stage, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Begun(tiny_dir, tmp_path)
    found.go()
    return found


def test_refs_are_fixed_as_revisions_at_the_start(begun: Begun, stage: Stage) -> None:
    (given,) = stage.given
    assert given.policy == begun.first  # type: ignore[union-attr]
    assert given.starts_from == begun.first  # type: ignore[union-attr]
    assert [one.adapter for one in given.reward] == [begun.reward, None]  # type: ignore[union-attr]
    inputs = read_inputs(begun.run)
    assert inputs.refs == {"doctor@default": begun.first, "judge@default": begun.reward}
    ((model, files),) = inputs.models.items()
    assert Path(model).name == "tiny"
    assert {"model.safetensors", "chat_template.jinja", "tokenizer.json"} <= set(files)


def test_unchanged_inputs_are_accepted(begun: Begun) -> None:
    begun.go()
    begun.data.touch()  # written anew with the same content
    begun.go()


def _file(begun: Begun) -> None:
    begun.data.write_text(begun.data.read_text() + begun.data.read_text()[:200].splitlines()[0] + "\n")


def _alias(begun: Begun) -> None:
    begun.publish("doctor", seed=3)


def _base(begun: Begun) -> None:
    weights = begun.folder / "models" / "tiny" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def _template(begun: Begun) -> None:
    template = begun.folder / "models" / "tiny" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


def _settings(begun: Begun) -> None:
    path = begun.run / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.0001", "learning_rate: 0.0002"))


def _function(begun: Begun) -> None:
    path = begun.folder / "our_rewards.py"
    path.write_text(path.read_text().replace("1.0", "2.0"))


CHANGES: dict[str, tuple[Callable[[Begun], None], str]] = {
    "a data file": (_file, r"file train\.jsonl has changed"),
    "an alias": (_alias, r"doctor@default changed from doctor@\w{12} to doctor@\w{12}"),
    "the base model": (_base, r"model tiny: model\.safetensors has changed"),
    "its chat template": (_template, r"model tiny: chat_template\.jinja has changed"),
    "the settings": (_settings, r"setting learning_rate changed from 0\.0001 to 0\.0002"),
    "a reward function": (_function, r"reward function our_rewards:length has changed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_refused_by_name_and_recorded_when_accepted(
    begun: Begun, stage: Stage, what: str
) -> None:
    change, words = CHANGES[what]
    change(begun)
    with pytest.raises(ConfigError, match=words) as refused:
        carry_out(begun.run_id, begun.folder)
    assert "--accept-changes" in str(refused.value)
    assert str(refused.value).count("\n  ") == 1, "one input changed, but several are reported"
    assert len(stage.given) == 1
    begun.go(accept_changes=True)
    (told,) = read_inputs(begun.run).changed
    begun.go()
    assert read_inputs(begun.run).changed == [told], "an accepted change stays recorded"


def test_a_missing_file_and_a_new_one(begun: Begun) -> None:
    begun.data.rename(begun.data.with_name("other.jsonl"))
    with pytest.raises(ConfigError, match=r"train\.jsonl"):
        carry_out(begun.run_id, begun.folder)


def test_an_alias_moved_by_the_run_itself_is_not_a_change(begun: Begun, stage: Stage) -> None:
    folder = make_folder(begun.folder / "own", seed=5)
    assert folder.provenance is not None
    folder.provenance["run_id"] = begun.run_id
    revision = begun.store.publish(folder.write(), "doctor", actor="training").revision
    begun.store.set_alias("doctor", "default", revision, actor="training")
    begun.go()
    assert stage.given[-1].policy == begun.first  # type: ignore[union-attr]


def test_the_manifest_has_parent_digests_and_accepted_changes(tiny_dir: Path, tmp_path: Path) -> None:
    copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    config = load_job(tmp_path, SFT, max_steps=2)
    run_id = begin(config, tmp_path)
    inputs = tmp_path / "runs" / run_id / INPUTS_FILE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_load_stage", lambda _: Stage())
        with pytest.raises(Interrupted):
            carry_out(run_id, tmp_path)
    digests = json.loads(inputs.read_text())["files"]
    data = next(file for source in config.train_files for file in source.files)
    data.write_text(data.read_text().replace("fever", "Fever") + data.read_text().splitlines()[0] + "\n")
    published = carry_out(run_id, tmp_path, accept_changes=True)
    manifest = AdapterStore(tmp_path / "store").get(AdapterRef.parse(published.ref))
    assert manifest.data_digests[data.name] != digests[str(data)]
    assert manifest.changed_inputs == [f"file {data.name}"]
    assert manifest.parent is None
    assert manifest.rounding is not None
    assert manifest.stop_token_ids == [2]
