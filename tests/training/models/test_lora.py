"""Loading of a job's base model, and the choice of modules that get an adapter."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from adapters import AdapterStore
from tests.training.jobs import LoadJob
from tests.training.tiny_models import ARCHITECTURES, tiny_model
from training.config import Lora, RopeScaling
from training.errors import ConfigError
from training.models import base_model
from training.models.base_model import Base, find_base, load_scorer, stretch
from training.models.lora import adaptable, adapted, lora_config, release, vocabulary_name


@pytest.fixture
def find(load_sft: LoadJob, tmp_path: Path) -> Callable[..., Base]:
    return lambda **changes: find_base(load_sft(**changes), AdapterStore(tmp_path))


def targeted(model: Any, asked: Lora) -> set[str]:
    adapter = get_peft_model(model, lora_config(asked, TaskType.CAUSAL_LM, model))
    found = {name for name, module in adapter.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix("base_model.model.") for name in found}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT corrects it itself
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_but_the_head_gets_an_adapter(architecture: str) -> None:
    model = tiny_model(architecture)
    there, head = set(adaptable(model)), vocabulary_name(model, "output")
    found = targeted(model, Lora())
    assert found == there
    names = {name.rpartition(".")[2] for name in found}
    assert names == ARCHITECTURES[architecture][1]
    assert head
    assert head not in names


def test_target_modules_selects_by_name() -> None:
    found = targeted(tiny_model("qwen3"), Lora(target_modules=["q_proj", "layers.1.mlp.up_proj"]))
    assert found == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["c_attn"], "has no c_attn; it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        (["q_proj", "W_pack", "query"], "has no W_pack and no query; it has"),
        (["proj"], "has no proj;"),
        (["lm_head"], "has no lm_head;"),
        (["embed_tokens"], "has no embed_tokens;"),
    ],
)
def test_unknown_target_modules_are_refused(asked: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.target_modules: the base model {message}"):
        lora_config(Lora(target_modules=asked), TaskType.CAUSAL_LM, tiny_model("llama"))


def test_unknown_modules_to_save_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"lora\.modules_to_save: the base model has no wte; it has model, "
    ):
        lora_config(Lora(modules_to_save=["wte"]), TaskType.CAUSAL_LM, tiny_model("llama"))


def test_rank_stabilised_scaling() -> None:
    model = tiny_model("llama")
    adapter = get_peft_model(
        model, lora_config(Lora(r=16, lora_alpha=8, use_rslora=True), TaskType.CAUSAL_LM, model)
    )
    scales = {
        scale for part in adapter.modules() if isinstance(part, LoraLayer) for scale in part.scaling.values()
    }
    assert scales == {2.0}  # 8 / sqrt(16)


# Quantisation


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes warns that it computes in float16
def test_a_quantised_base_learns(find: Callable[..., Base], bits: str) -> None:
    base = find(quantization=bits)
    model = base.causal_lm()
    linear = model.model.layers[0].mlp.up_proj
    kind = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    assert type(linear).__name__ == kind
    if bits == "4bit":
        assert linear.weight.quant_state.quant_type == "nf4"
        assert linear.weight.quant_state.nested, "double quantisation"
    assert type(model.lm_head) is torch.nn.Linear
    adapter = get_peft_model(model, lora_config(Lora(r=4), TaskType.CAUSAL_LM, model))
    ids = torch.tensor([base.tokenizer("感冒有什么症状？").input_ids])
    optimizer = torch.optim.AdamW([one for one in adapter.parameters() if one.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = adapter(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    release(adapter)
    assert next(adapter.parameters(), None) is None
    assert next(model.parameters(), None) is None


def test_a_quantised_base_still_learns_after_evaluation(
    find: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes by default stops gradients after the first evaluation."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = find(quantization="4bit")
    ids = torch.tensor([base.tokenizer("感冒有什么症状？").input_ids])
    for model, ask in (
        (base.causal_lm(), lambda model: model(input_ids=ids, labels=ids).loss),
        (base.scorer(), lambda model: model(inputs_embeds=model.get_input_embeddings()(ids)).logits.sum()),
    ):
        model.enable_input_require_grads()
        low = model.model.layers[0].input_layernorm.weight.requires_grad_()
        (before,) = torch.autograd.grad(ask(model), low)
        with torch.no_grad():
            ask(model.eval())
        (after,) = torch.autograd.grad(ask(model.train()), low)
        assert before.any()
        assert torch.equal(before, after)


def test_a_plain_base_is_not_quantised(find: Callable[..., Base]) -> None:
    base = find(quantization="4bit")
    expected = AutoModelForCausalLM.from_pretrained(base.folder).state_dict()
    found = base.causal_lm(plain=True).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_a_quantised_scorer_has_an_unquantised_head(find: Callable[..., Base]) -> None:
    model = find(quantization="4bit").scorer()
    assert type(model.score) is torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_a_new_score_head_logs_no_warning(
    find: Callable[..., Base], caplog: pytest.LogCaptureFixture
) -> None:
    base = find()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load_scorer(base.folder, num_labels=1)
        base.scorer()
        assert not caplog.messages
        AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=1)
        assert "score.weight" in caplog.messages[0]
    finally:
        logger.removeHandler(caplog.handler)


def test_quantisation_without_bitsandbytes_names_the_package(
    find: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="quantization needs bitsandbytes: pip install bitsandbytes"):
        find(quantization="4bit").causal_lm()


# A longer context


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rope_scaling_stretches_the_context(find: Callable[..., Base], kind: str) -> None:
    base = find(rope_scaling={"type": kind, "factor": 4.0}, merge=True, publish={}, golden={})
    plain, stretched = find().causal_lm(), base.causal_lm()
    parameters = stretched.config.rope_parameters
    assert (parameters["rope_type"], parameters["factor"]) == (kind, 4.0)
    assert parameters["rope_theta"] == plain.config.rope_parameters["rope_theta"]
    assert stretched.model.rotary_emb.rope_type == kind
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        is_same = torch.allclose(plain(ids).logits, stretched(ids).logits, atol=1e-5)
    assert is_same == (kind == "dynamic"), "dynamic changes positions beyond the old context only"


def test_rope_scaling_is_refused_where_impossible() -> None:
    asked = RopeScaling(type="linear", factor=2)
    with pytest.raises(ConfigError, match="rope_scaling: old has no rotary positions"):
        stretch(AutoConfig.for_model("bloom"), asked, "old")
    config = AutoConfig.for_model("qwen3")
    stretch(config, asked, "long")
    with pytest.raises(ConfigError, match=r"rope_scaling: long is already stretched \(linear\)"):
        stretch(config, asked, "long")


# Python code that comes with a base model


@pytest.fixture
def coded(tiny_dir: Path, tmp_path: Path) -> Path:
    """A base model with its own architecture code, like some old models of the hub."""
    folder = tmp_path / "coded"
    copytree(tiny_dir / "models" / "tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "architectures": ["Homemade"],
        "auto_map": {"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Homemade"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "homemade.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n\n\n"
        "class Config(Qwen3Config):\n    model_type = 'homemade'\n\n\n"
        "class Homemade(Qwen3ForCausalLM):\n    config_class = Config\n"
    )
    return folder


def test_code_of_a_base_runs_only_if_trusted(
    find: Callable[..., Base], coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="coded needs Python code that comes with it: set `trust_remote_code: true`"
    ):
        find(base_model=str(coded))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    base = find(base_model=str(coded), trust_remote_code=True)
    assert type(base.causal_lm()).__name__ == "Homemade"


def test_adapted_loads_a_folder_on_the_plain_base(find: Callable[..., Base], tmp_path: Path) -> None:
    base = find(quantization="4bit")
    model = base.causal_lm(plain=True)
    adapter = get_peft_model(model, lora_config(Lora(r=4), TaskType.CAUSAL_LM, model))
    torch.nn.init.ones_(adapter.base_model.model.model.layers[0].mlp.up_proj.lora_B.default.weight)
    adapter.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(base, tmp_path / "adapter")(ids).logits, adapter.eval()(ids).logits
        )
