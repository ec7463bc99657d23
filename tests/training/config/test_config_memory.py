"""Settings that save memory or make a base model, and their valid combinations."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from training.config import PtConfig, RopeScaling, dump_config, load_config
from training.errors import ConfigError

SFT: dict[str, Any] = {"stage": "sft", "name": "doctor", "base_model": "base", "train_files": ["train.jsonl"]}
MORE: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {},
    "orpo": {},
    "ppo": {"policy": "doctor", "reward": "judge", "steps": 1},
    "grpo": {"policy": "doctor", "reward": "judge", "steps": 1},
}
ROPE = {"type": "linear", "factor": 2.0}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "base").mkdir()
    (tmp_path / "words.txt").write_text("心肌梗死\n\n  阿司匹林 \n")

    def load(stage: str = "sft", **changes: Any) -> Any:
        (tmp_path / "job.yaml").write_text(
            yaml.safe_dump({**SFT, **MORE.get(stage, {}), "stage": stage, **changes})
        )
        return load_config(tmp_path / "job.yaml", root=tmp_path)

    return load


@pytest.mark.parametrize("stage", ["sft", "pt", *MORE])
def test_every_chat_stage_can_make_a_base(load: Any, stage: str) -> None:
    assert not load(stage).makes_base
    assert load(stage, merge=True).makes_base


@pytest.mark.parametrize(
    "needs_merge",
    [{"lora": {"use_dora": True}}, {"lora": {"modules_to_save": ["embed_tokens"]}}, {"rope_scaling": ROPE}],
)
def test_a_setting_that_the_engine_cannot_serve_needs_merge(load: Any, needs_merge: dict[str, Any]) -> None:
    load(merge=True, **needs_merge)
    with pytest.raises(
        ConfigError, match="needs `merge: true`: the serving engine cannot load it in an adapter"
    ):
        load(**needs_merge)


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("sft", {"merge": True, "publish": {"alias": "default"}}, r"publish\.alias has no effect: this job"),
        ("sft", {"merge": True, "golden": {"prompts": 9}}, "golden has no effect: this job makes a base"),
        ("pt", {"full": True, "publish": {"alias": "default"}}, r"publish\.alias has no effect"),
        ("pt", {"full": True, "merge": True}, "merge has no effect with `full: true`"),
        ("pt", {"full": True, "lora": {"r": 8}}, "lora has no effect with `full: true`"),
        ("pt", {"full": True, "quantization": "4bit"}, "quantization has no effect with `full: true`"),
        ("pt", {"new_tokens": ["a"]}, "new_tokens needs `merge: true` or `full: true`"),
        ("pt", {"new_tokens": ["a", "b", "a"], "full": True}, "new_tokens: duplicates: a"),
        ("pt", {"new_tokens": [" a"], "full": True}, "new_tokens: a token must not begin or end with white space"),
        ("pt", {"new_tokens": "nowhere.txt", "full": True}, r"new_tokens: .*nowhere\.txt cannot be read"),
        ("pt", {"neftune_noise_alpha": 5}, "neftune_noise_alpha: no such setting"),
        ("sft", {"neftune_noise_alpha": 0}, "neftune_noise_alpha: must be more than 0"),
        ("sft", {"neftune_noise_alpha": 5, "packing": True}, "neftune_noise_alpha depends on the length of a row"),
        ("sft", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be at least"),
        ("ppo", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: no such setting"),
        ("sft", {"quantization": "2bit"}, "quantization: must be '4bit' or '8bit'"),
        ("sft", {"merge": True, "rope_scaling": {"type": "linear", "factor": 1}}, r"rope_scaling\.factor: must be"),
        ("rm", {"merge": True}, "merge: a reward adapter cannot be merged"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_an_error(
    load: Any, stage: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        load(stage, **changes)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pt", {}),
        ("pt", {"full": True, "new_tokens": "words.txt", "packing": False}),
        ("pt", {"merge": True, "lora": {"use_dora": True}, "rope_scaling": ROPE}),
        ("sft", {"merge": True, "quantization": "8bit", "trust_remote_code": True}),
        ("sft", {"packing": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 4}),
        ("dpo", {"merge": True, "policy": "doctor"}),
    ],
)
def test_settings_survive_the_dump(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, changes: dict[str, Any]
) -> None:
    config = load(stage, **changes)
    (tmp_path / "words.txt").unlink()
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_new_tokens_may_be_a_file(load: Any) -> None:
    config = load("pt", full=True, new_tokens="words.txt")
    assert isinstance(config, PtConfig)
    assert config.new_tokens == ("心肌梗死", "阿司匹林")


def test_rope_scaling_is_read(load: Any) -> None:
    assert load(merge=True, rope_scaling=ROPE).rope_scaling == RopeScaling(type="linear", factor=2.0)
