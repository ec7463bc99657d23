from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import yaml

import training
from training.config import STAGES, OnError, SftConfig, Source, dump_config, fields, load_config
from training.demo.corpus import write_corpus
from training.errors import ConfigError

SHIPPED = [
    path
    for path in sorted(Path(training.__file__).parent.rglob("*.yaml"))
    if "stage" in yaml.safe_load(path.read_text())
]
TEMPLATES = [path for path in SHIPPED if path.parent.name == "configs"]


@pytest.fixture
def job(tmp_path: Path) -> dict[str, object]:
    """The required settings of an SFT job, with files that exist."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "heldout.jsonl").write_text("{}\n")
    (tmp_path / "base").mkdir()
    return {"stage": "sft", "name": "doctor", "base_model": "base", "train_files": ["train.jsonl"]}


LEAST: dict[str, dict[str, object]] = {
    "scratch": {"steps": 1, "base_model": None},
    "ppo": {"policy": "doctor", "reward": "doctor-rm@default", "steps": 1},
    "grpo": {"policy": "doctor", "reward": ["doctor-rm", {"function": "rewards:length"}], "steps": 1},
}
"""Required settings of a stage beyond those of an SFT job; None removes one."""


def job_of(stage: str, job: dict[str, object], **changes: object) -> dict[str, object]:
    asked = {**job, "stage": stage, **LEAST.get(stage, {}), **changes}
    return {name: value for name, value in asked.items() if value is not None}


def load(tmp_path: Path, job: object) -> Any:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_config(path, root=tmp_path)


def refusal(tmp_path: Path, job: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, job)
    return str(caught.value)


def test_every_stage_has_an_example_config() -> None:
    assert {path.stem for path in TEMPLATES} == set(STAGES)


def test_the_demo_has_a_config_for_each_job() -> None:
    demo = {path.name for path in SHIPPED if path.parent.name == "demo"}
    assert demo == {"base.yaml", "doctor.yaml", "doctor-rm.yaml", "doctor-ppo.yaml", "leaflet.yaml"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_shipped_config_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = path.parent.name == "demo"
    root = tmp_path if demo else tmp_path / "xinglin-data"
    write_corpus(root / "demo")
    (root / "models" / "xinglin-demo").mkdir(parents=True)
    assert load_config(path, root=tmp_path if demo else None).stage in path.read_text()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_shipped_config_states_its_command(path: Path) -> None:
    assert f"python -m training run training/configs/{path.name}" in path.read_text()


def test_defaults_are_filled_in_and_paths_are_absolute(tmp_path: Path, job: dict[str, object]) -> None:
    config = load(tmp_path, job)
    assert isinstance(config, SftConfig)
    assert config.train_files == [Source(path=str(tmp_path / "train.jsonl"))]
    assert config.train_files[0].files == (tmp_path / "train.jsonl",)
    assert config.base_model == str(tmp_path / "base")
    assert config.lora.r == 16
    assert config.publish.alias is None
    assert config.on_error == OnError(action="stop", limit=100)


@pytest.mark.parametrize("stage", STAGES)
def test_a_dumped_config_is_the_same_config_from_anywhere(
    stage: str, tmp_path: Path, job: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(tmp_path, job_of(stage, job))
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("sft", {"epochs": 2}),
        ("sft", {"max_steps": 7}),
        ("sft", {"adapter": "doctor@3f2a9c1b77de"}),
        ("sft", {"evaluation_files": ["heldout.jsonl"], "evaluate_every": 2, "early_stop": 3}),
        ("sft", {"train_files": ["train.jsonl", {"path": "held*.jsonl", "weight": 0.5}], "on_error": "skip"}),
        ("sft", {"general_files": [{"path": "heldout.jsonl", "weight": 2}]}),
        ("sft", {"report_to": ["trackio", "wandb"]}),
        ("scratch", {"report_to": ["mlflow"]}),
        ("ppo", {"general_files": ["heldout.jsonl"], "report_to": ["wandb"]}),
        ("dpo", {"policy": "doctor", "max_steps": 3}),
        ("grpo", {"reward": {"model": "base"}}),
        ("grpo", {"reward": {"judge": "http://127.0.0.1:8000/v1", "judge_model": "m"}}),
    ],
)
def test_settings_survive_the_dump(
    stage: str,
    change: dict[str, object],
    tmp_path: Path,
    job: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fields, "find_spec", lambda name: ModuleSpec(name, None, origin="installed"))
    config = load(tmp_path, job_of(stage, job, **change))
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "resolved.yaml") == config
    dumped = yaml.safe_load(dump_config(config))
    assert dumped["report_to"] == change.get("report_to", [])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"learning_rat": 1}, "learning_rat: no such setting; did you mean `learning_rate`?"),
        ({"lora": {"rank": 8}}, "lora.rank: no such setting"),
        ({"lora": {"lora_alfa": 8}}, "lora.lora_alfa: no such setting; did you mean `lora_alpha`?"),
        ({"lora": {"r": -1}}, "lora.r: must be at least 1"),
        ({"train_files": ["nowhere.jsonl"]}, "train_files.0: no such file:"),
        ({"train_files": ["nowhere/*.jsonl"]}, "train_files.0: no such file:"),
        ({"train_files": []}, "train_files: must have at least 1 entry"),
        (
            {"train_files": [{"path": "train.jsonl", "wieght": 2}]},
            "train_files.0.wieght: no such setting; did you mean `weight`?",
        ),
        (
            {"train_files": [{"path": "train.jsonl", "weight": 0}]},
            "train_files.0.weight: must be more than 0",
        ),
        (
            {"train_files": [{"path": "train.jsonl", "files": ["x"]}]},
            "train_files.0: set `path` instead of `files`",
        ),
        ({"on_error": "ignore"}, "on_error.action: must be 'stop' or 'skip'"),
        ({"base_model": "no/such/folder"}, "base_model: no such folder:"),
        ({"name": "Doctor Who"}, "name: 'Doctor Who' cannot name an adapter"),
        ({"adapter": "my doctor@default"}, "adapter: 'my doctor' cannot name an adapter"),
        ({"publish": {"alias": "0123456789ab"}}, "publish.alias: '0123456789ab' cannot name an alias"),
        ({"golden": {"prompts": 3}}, "golden.prompts: must be at least 8"),
        ({"epochs": 1, "max_steps": 5}, "set epochs or max_steps, not both"),
        (
            {"evaluation_files": ["train.jsonl"]},
            "data files need distinct names for the manifest: train.jsonl",
        ),
        (
            {"general_files": ["train.jsonl"]},
            "data files need distinct names for the manifest: train.jsonl",
        ),
        ({"report_to": ["tensorboard"]}, "report_to.0: must be 'wandb', 'trackio' or 'mlflow'"),
        ({"report_to": "wandb"}, "report_to: must be a list"),
        ({"stage": "sfft"}, "stage: must be one of scratch, "),
        ({"stage": None}, "stage: must be one of scratch, "),
        ({"stage": "scratch", "steps": 1, "base_model": "base"}, "base_model: no such setting"),
    ],
)
def test_an_error_names_file_and_field(
    tmp_path: Path, job: dict[str, object], change: dict[str, object], complaint: str
) -> None:
    assert f"{tmp_path / 'job.yaml'}: {complaint}" in refusal(tmp_path, {**job, **change})


@pytest.mark.parametrize(
    ("stage", "change", "complaint"),
    [
        ("sft", {"evaluate_every": 2}, "evaluate_every has no effect without evaluation_files"),
        ("sft", {"evaluation_files": ["heldout.jsonl"], "early_stop": 2}, "early_stop needs evaluate_every"),
        (
            "sft",
            {
                "evaluation_files": ["heldout.jsonl"],
                "evaluate_every": 2,
                "early_stop": 2,
                "checkpoint_every": 3,
            },
            "checkpoint_every has no effect with early_stop",
        ),
        (
            "sft",
            {"adapter": "doctor", "lora": {"r": 4}},
            "lora has no effect: training continues from doctor@default",
        ),
        (
            "dpo",
            {"policy": "doctor@canary", "lora": {"r": 4}},
            "lora has no effect: training continues from doctor@canary",
        ),
        ("ppo", {"lora": {"r": 4}}, "lora has no effect: training continues from doctor@default"),
        ("rm", {"golden": {"prompts": 9}}, "golden has no effect: a reward adapter does not generate"),
        (
            "rm",
            {"general_files": ["heldout.jsonl"]},
            "general_files have no effect: a reward adapter does not generate",
        ),
        ("ppo", {"kl_coefficient": 0, "kl_target": 2}, "kl_target has no effect with kl_coefficient 0"),
        ("ppo", {"minibatch_size": 5}, "minibatch_size must divide batch_size"),
        ("grpo", {"generations": 5}, "generations must divide batch_size"),
        ("ppo", {"reward": []}, "reward: must have at least 1 entry"),
        ("ppo", {"reward": {}}, "reward.0: set exactly one of adapter, model, function and judge, not none"),
        (
            "ppo",
            {"reward": [{"adapter": "doctor-rm", "model": "base"}]},
            "reward.0: set exactly one of adapter, model, function and judge, not adapter and model",
        ),
        (
            "ppo",
            {"reward": [{"judge": "http://127.0.0.1/v1"}]},
            "reward.0: set judge and judge_model together",
        ),
        (
            "ppo",
            {"reward": [{"adapter": "doctor-rm", "judge_prompt": "Rate it."}]},
            "reward.0: judge_prompt has no effect without judge",
        ),
        ("ppo", {"reward": [{"model": "no/such/folder"}]}, "reward.0.model: no such folder:"),
        ("ppo", {"reward": [{"function": "length"}]}, "reward.0.function: must match"),
        (
            "ppo",
            {"reward": [{"adaptor": "doctor-rm"}]},
            "reward.0.adaptor: no such setting; did you mean `adapter`?",
        ),
    ],
)
def test_a_setting_without_effect_is_rejected(
    stage: str, change: dict[str, object], complaint: str, tmp_path: Path, job: dict[str, object]
) -> None:
    assert f"job.yaml: {complaint}" in refusal(tmp_path, job_of(stage, job, **change))


def test_all_problems_are_reported_at_once(tmp_path: Path, job: dict[str, object]) -> None:
    assert len(refusal(tmp_path, {**job, "seed": -1, "batch_size": 0}).splitlines()) == 2


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ({"head_dim": 40}, "model: head_dim must be one of 32, 64"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "model: num_key_value_heads must divide"),
    ],
)
def test_a_model_size_that_cannot_be_served_is_rejected(
    model: dict[str, int], complaint: str, tmp_path: Path, job: dict[str, object]
) -> None:
    assert complaint in refusal(tmp_path, job_of("scratch", job, model=model))


@pytest.mark.parametrize("text", ["stage: [", "- a\n- b\n", "\xff"])
def test_an_invalid_config_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"job\.yaml: "):
        load_config(path)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_base_that_an_earlier_job_makes_need_not_exist(
    tmp_path: Path, job: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**job, "base_model": "./x/../models/to-come"}))
    config = load_config(path, root=tmp_path, to_come=[tmp_path / "models" / "to-come"])
    assert isinstance(config, SftConfig)
    assert Path(config.base_model).resolve() == tmp_path / "models" / "to-come"


@pytest.fixture(params=["data", "data [1]"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """b.jsonl and a.jsonl, a hidden file, and c.jsonl in a folder below."""
    folder: Path = tmp_path / request.param
    (folder / "below").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "below/c.jsonl"):
        (folder / name).write_text("{}\n")
    return folder


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a.jsonl", ["a.jsonl"]),
        (".", ["a.jsonl", "b.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "c.jsonl"]),
        ("[b-z].jsonl", ["b.jsonl"]),
    ],
)
def test_a_source_is_a_file_a_folder_or_a_glob(path: str, names: list[str], folder: Path) -> None:
    source = Source.model_validate(path, context={"root": folder})
    assert sorted(file.name for file in source.files) == names
    assert all(file.is_absolute() for file in source.files)
    assert Source.model_validate(source.model_dump()) == source


def test_a_source_starts_from_the_current_directory_or_from_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "below"))
    assert Source(path="a.jsonl").files == (folder / "a.jsonl",)
    assert Source(path="~/c.jsonl", weight=2.0).files == (folder / "below" / "c.jsonl",)
