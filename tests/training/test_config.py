from pathlib import Path

import pytest
import yaml

import training
from training.config import ConfigError, PtConfig, SftConfig, dump_config, load_config
from training.demo.corpus import write_corpus

SHIPPED = [
    path
    for path in sorted(Path(training.__file__).parent.rglob("*.yaml"))
    if "stage" in yaml.safe_load(path.read_text())
]


@pytest.fixture
def job(tmp_path: Path) -> dict[str, object]:
    """The least an SFT job must say, with files that exist."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "base").mkdir()
    return {"stage": "sft", "name": "doctor", "base_model": "base", "train_files": ["train.jsonl"]}


def load(tmp_path: Path, job: object) -> PtConfig | SftConfig:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_config(path, root=tmp_path)


def test_there_are_shipped_configs() -> None:
    assert {path.name for path in SHIPPED} == {
        "pt.yaml",
        "sft.yaml",
        "base.yaml",
        "doctor.yaml",
        "leaflet.yaml",
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_can_be_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demo = path.parent.name == "demo"
    root = tmp_path if demo else tmp_path / "xinglin-data"
    write_corpus(root / "demo")
    (root / "models" / "xinglin-demo").mkdir(parents=True)
    assert load_config(path, root=tmp_path if demo else None).stage in path.read_text()


@pytest.mark.parametrize(
    "path", [p for p in SHIPPED if p.parent.name == "configs"], ids=lambda path: path.name
)
def test_a_shipped_config_says_how_to_run_it(path: Path) -> None:
    assert f"python -m training run training/configs/{path.name}" in path.read_text()


def test_defaults_are_filled_in_and_paths_made_absolute(tmp_path: Path, job: dict[str, object]) -> None:
    config = load(tmp_path, job)
    assert isinstance(config, SftConfig)
    assert config.train_files == [tmp_path / "train.jsonl"]
    assert config.base_model == str(tmp_path / "base")
    assert config.lora.r == 16
    assert config.publish.alias is None


@pytest.mark.parametrize("length", [{}, {"epochs": 2}, {"max_steps": 7}])
def test_a_dumped_config_is_the_same_config_from_anywhere(
    tmp_path: Path, job: dict[str, object], monkeypatch: pytest.MonkeyPatch, length: dict[str, int]
) -> None:
    config = load(tmp_path, {**job, **length})
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"learning_rat": 1}, "learning_rat: no such setting; did you mean `learning_rate`?"),
        ({"lora": {"rank": 8}}, "lora.rank: no such setting"),
        ({"lora": {"r": -1}}, "lora.r: Input should be greater than or equal to 1"),
        ({"train_files": ["nowhere.jsonl"]}, "train_files.0: no such file:"),
        ({"train_files": []}, "train_files: List should have at least 1 item"),
        ({"base_model": "no/such/folder"}, "base_model: no such folder:"),
        ({"name": "Doctor Who"}, "name: 'Doctor Who' cannot name an adapter"),
        ({"publish": {"alias": "0123456789ab"}}, "publish.alias: '0123456789ab' cannot name an alias"),
        ({"golden": {"prompts": 3}}, "golden.prompts: Input should be greater than or equal to 8"),
        ({"epochs": 1, "max_steps": 5}, "give epochs or max_steps, not both"),
        (
            {"evaluation_files": ["train.jsonl"]},
            "data files need different names, for the manifest: train.jsonl",
        ),
        ({"stage": "sfft"}, "stage: give one of pt, sft"),
        ({"stage": "pt", "steps": 1, "base_model": "base"}, "base_model: no such setting"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_field(
    tmp_path: Path, job: dict[str, object], change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {**job, **change})
    assert f"{tmp_path / 'job.yaml'}: {complaint}" in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path, job: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {**job, "seed": -1, "batch_size": 0})
    assert len(str(caught.value).splitlines()) == 2


def test_a_head_size_that_kills_the_engine_is_refused(tmp_path: Path, job: dict[str, object]) -> None:
    wrong = {
        "stage": "pt",
        "name": "base",
        "train_files": job["train_files"],
        "steps": 1,
        "model": {"head_dim": 40},
    }
    with pytest.raises(ConfigError, match="model: head_dim must be one of 32, 64"):
        load(tmp_path, wrong)


@pytest.mark.parametrize("text", ["stage: [", "- a\n- b\n", "\xff"])
def test_what_is_no_config_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"job\.yaml: "):
        load_config(path)


def test_a_missing_config_is_refused_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
