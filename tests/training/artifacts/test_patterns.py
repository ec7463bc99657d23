"""Adapters with regular expressions in their config give the same outputs after conversion."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapters import AdapterStore, InvalidAdapter, validate
from tests.training.artifacts.test_convert import logits
from training.artifacts.convert import convert_adapter

# As Unsloth, ms-swift and axolotl write them
CONFIGS: dict[str, dict[str, Any]] = {
    "Unsloth": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj|down_proj)))"
    },
    "ms-swift": {"target_modules": r"^(model\.layers(?=\.).*\.(gate_proj|o_proj|q_proj))$"},
    "one layer": {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
    "ranks by expression": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {r".*\.layers\.1\.self_attn\.(q_proj|v_proj)": 2},
        "alpha_pattern": {
            r".*\.layers\.1\.self_attn\.(q_proj|v_proj)": 12,
            r"layers\.[0-9]+\.mlp\.up_proj": 3,
        },
    },
    "most of another rank": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r".*layers\.\d+\.self_attn\..*": 8},
        "use_rslora": True,
    },
}


def trained(base: Path, folder: Path, **config: Any) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **config)
    get_peft_model(model, lora).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("checked", [True, False], ids=["with base", "without base"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_conversion_keeps_the_outputs(kind: str, checked: bool, tiny_dir: Path, tmp_path: Path) -> None:
    base = tiny_dir / "models" / "tiny"
    source, target = trained(base, tmp_path / "theirs", **CONFIGS[kind]), tmp_path / "ours"
    with pytest.raises(InvalidAdapter, match="no regular expression"):
        validate(source)
    convert_adapter(source, target, base_model=str(base) if checked else None)
    assert (logits(base, target) - logits(base, source)).abs().max() < 1e-5
    store = AdapterStore(tmp_path / "store")
    assert store.publish(target, "theirs", actor="test").revision


def test_plain_names_stay_unchanged(tiny_dir: Path, tmp_path: Path) -> None:
    base = tiny_dir / "models" / "tiny"
    source = trained(
        base, tmp_path / "theirs", target_modules=["v_proj", "q_proj"], rank_pattern={"q_proj": 2}
    )
    convert_adapter(source, tmp_path / "ours", base_model=str(base))
    facts = validate(tmp_path / "ours")
    assert facts.target_modules == ["q_proj", "v_proj"]
    assert facts.config["rank_pattern"] == {"q_proj": 2}
