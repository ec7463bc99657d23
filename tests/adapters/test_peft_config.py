"""adapters/peft_config.py: the config a revision keeps, and its assumptions about PEFT and vLLM."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from adapters import validate
from adapters.peft_config import _ENGINE_RANKS, _KEPT, _LEFT_OUT, _UNSERVABLE
from tests.adapters.changes import Change, config
from tests.adapters.folders import Folder


def canonical(folder: Folder) -> str:
    return json.dumps(validate(folder.write()).config)


SAME: dict[str, Change] = {
    "another path of the base": config(base_model_name_or_path="D:\\models\\tiny"),
    "the set in another order": config(target_modules=["down_proj", "q_proj"]),
    "a module twice": config(target_modules=["q_proj", "down_proj", "q_proj"]),
    "keys in another order": lambda f: setattr(f, "config", dict(reversed(f.config.items()))),
    "PEFT's own notes": config(
        auto_mapping={"parent_library": "os"}, revision="main", peft_version="0.99", inference_mode=False
    ),
    "settings without a value": config(use_dora=False, layer_replication=None, rank_pattern={}, exclude_modules=None),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_equal_adapters_have_equal_configs(adapter: Folder, change: Change) -> None:
    before = canonical(adapter)
    change(adapter)
    assert canonical(adapter) == before


@pytest.mark.parametrize(
    "change",
    [
        config(lora_alpha=16),
        config(use_rslora=True),
        config(alpha_pattern={"q_proj": 4}),
        config(task_type="SEQ_CLS"),
    ],
)
def test_different_adapters_have_different_configs(adapter: Folder, change: Change) -> None:
    before = canonical(adapter)
    change(adapter)
    assert canonical(adapter) != before


def test_order_of_excluded_modules_does_not_matter(adapter: Folder) -> None:
    adapter.config["exclude_modules"] = ["k_proj", "v_proj"]
    before = canonical(adapter)
    adapter.config["exclude_modules"] = ["v_proj", "k_proj"]
    assert canonical(adapter) == before


def test_patterns_keep_their_order(adapter: Folder) -> None:
    adapter.config["alpha_pattern"] = {"self_attn.q_proj": 2, "q_proj": 32, "down_proj": 1}
    kept = validate(adapter.write()).config["alpha_pattern"]
    assert list(kept.items()) == list(adapter.config["alpha_pattern"].items())


def test_config_has_no_host_path_and_no_library(adapter: Folder) -> None:
    adapter.config["auto_mapping"] = {"parent_library": "evil"}
    kept = validate(adapter.write()).config
    assert kept["base_model_name_or_path"] == "tiny"
    assert "auto_mapping" not in kept
    assert kept["inference_mode"] is True


# Assumptions about PEFT and vLLM, checked against their source as text: importing them takes 15 s


def source(package: str, path: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / path).read_text())


def fields(module: ast.Module, name: str) -> set[str]:
    [found] = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    return {
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_every_setting_of_peft_is_known() -> None:
    """If this fails after an upgrade of PEFT, decide for each new setting whether it can be served."""
    settings = fields(source("peft", "tuners/lora/config.py"), "LoraConfig")
    for parent in ("PeftConfigMixin", "PeftConfig"):
        settings |= fields(source("peft", "config.py"), parent)
    assert len(settings) > 30
    assert settings - _KEPT - _LEFT_OUT - _UNSERVABLE.keys() == set()


def test_every_setting_that_vllm_reads_is_kept_or_refused() -> None:
    read = fields(source("vllm", "lora/peft_helper.py"), "PEFTHelper")
    assert {"r", "lora_alpha", "alpha_pattern"} <= read
    assert {field for field in read if not field.startswith("vllm_")} - _KEPT - _UNSERVABLE.keys() == set()


def test_the_ranks_are_those_of_vllm() -> None:
    text = ast.unparse(source("vllm", "config/lora.py"))
    assert f"MaxLoRARanks = Literal{list(_ENGINE_RANKS)}" in text
