import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adapters import AdapterRef, AdapterStore, InvalidAdapter, Provenance, fingerprint, read_golden, validate
from tests.training.old_adapters import PREFIX, TARGETS, Evil, Tensors, old_folder, renamed
from training.artifacts.convert import convert_adapter
from training.errors import ConfigError


@pytest.fixture(scope="module")
def base(tiny_dir: Path) -> Path:
    return tiny_dir / "models" / "tiny"


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter saved by today's PEFT that changes every layer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    folder = tmp_path_factory.mktemp("trained")
    get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def tensors(trained: Path) -> Tensors:
    return load_file(trained / "adapter_model.safetensors")


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.inference_mode():
        return model(torch.arange(3, 23)[None]).logits


def problems_of(source: Path, target: Path, **options: Any) -> str:
    with pytest.raises(InvalidAdapter) as caught:
        convert_adapter(source, target, **options)
    assert not target.exists()
    assert [path for path in target.parent.iterdir() if path != source] == []
    return str(caught.value)


VARIANTS = {
    "as PEFT 0.2 saved it": lambda tensors: tensors,
    "adapter's name in the keys": lambda tensors: renamed(tensors, ".weight", ".default.weight"),
    "another name in the keys": lambda tensors: renamed(tensors, ".weight", ".medical.weight"),
    "no prefix": lambda tensors: renamed(tensors, PREFIX, ""),
    "prefix twice": lambda tensors: renamed(tensors, PREFIX, PREFIX * 2),
    "in a compiled, parallel model": lambda tensors: renamed(tensors, PREFIX, "module._orig_mod." + PREFIX),
    "sharded, with layers that compute twice": lambda tensors: renamed(
        tensors, ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
    "buffers beside them": lambda tensors: {
        **tensors, PREFIX + "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)
    },
    "trained parameters": lambda tensors: {key: torch.nn.Parameter(value) for key, value in tensors.items()},
}  # fmt: skip


@pytest.mark.parametrize("checked", [True, False], ids=["with base", "without base"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_keeps_the_outputs_of_an_old_adapter(
    variant: str, checked: bool, trained: Path, tensors: Tensors, base: Path, tmp_path: Path
) -> None:
    source = old_folder(tmp_path / "old", VARIANTS[variant](tensors))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    target = tmp_path / "new"
    convert_adapter(source, target, base_model=str(base) if checked else None)
    assert (logits(base, target) - logits(base, trained)).abs().max() == 0
    assert validate(target).provenance.stage == "external"
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "provenance.json"
    ]  # fmt: skip
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_half_precision_is_kept(trained: Path, tensors: Tensors, base: Path, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", {key: value.half() for key, value in tensors.items()})
    convert_adapter(source, tmp_path / "new", base_model=str(base))
    torch.testing.assert_close(logits(base, tmp_path / "new"), logits(base, trained), atol=5e-2, rtol=0)
    saved = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}


def test_only_current_settings_remain(tensors: Tensors, base: Path, tmp_path: Path) -> None:
    source = old_folder(
        tmp_path / "old", tensors, lora_alpha=8.0, merge_weights=True, some_new_option=False, some_flag=True
    )
    convert_adapter(source, tmp_path / "new", base_model=str(base), drop=["some_flag"])
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 8
    assert isinstance(config["lora_alpha"], int)
    assert config["base_model_name_or_path"] == "tiny"
    assert not config.keys() & {"enable_lora", "merge_weights", "some_new_option", "some_flag"}


def test_changes_are_logged(
    tensors: Tensors, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = old_folder(
        tmp_path / "old", renamed({**tensors, PREFIX + "masked_bias": torch.ones(1)}, PREFIX, "")
    )
    (source / "training_args.bin").write_bytes(b"never read")
    with caplog.at_level("INFO", logger="training"):
        convert_adapter(source, tmp_path / "new", base_model=str(base))
    for message in (
        "read adapter_model.bin: 9 tensors",
        "left out 'enable_lora' (None), 'merge_weights' (False)",
        "'masked_bias'",
        "renamed 8 tensors",
        "all tensor names and shapes match tiny",
        "ignored files: 'training_args.bin'",
        "the adapter has no chat template",
    ):
        assert message in caplog.text


def test_it_can_be_published(tensors: Tensors, base: Path, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", tensors)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert_adapter(source, tmp_path / "new", base_model=str(base))
    store = AdapterStore(tmp_path / "store")
    manifest = store.publish(tmp_path / "new", "doctor", actor="test")
    assert store.get(AdapterRef("doctor", revision=manifest.revision)).base_fingerprint == fingerprint(base)
    assert manifest.base_model == "tiny"
    assert manifest.chat_template_digest
    assert "adapter_model.bin with SHA-256" in str(manifest.notes)


def test_golden_prompts_prove_it(tensors: Tensors, base: Path, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", tensors)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "…"}]}
        for n in range(9)
    ]
    convert_adapter(source, tmp_path / "new", base_model=str(base), golden_rows=rows)
    prompts = read_golden(tmp_path / "new" / "golden.jsonl")
    assert len(prompts) == 9
    assert all(prompt.logprobs != prompt.base_logprobs for prompt in prompts)
    assert validate(tmp_path / "new").golden_prompts == 9
    with pytest.raises(ConfigError, match="need the base model"):
        convert_adapter(source, tmp_path / "newer", golden_rows=rows)


# Refused


def test_a_hostile_or_empty_pickle_writes_nothing(tensors: Tensors, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", {**tensors, "x": Evil(tmp_path / "old" / "ran")})
    assert "none of it was run" in problems_of(source, tmp_path / "new")
    assert not (source / "ran").exists()
    torch.save({}, source / "adapter_model.bin")
    assert "contains no tensors" in problems_of(source, tmp_path / "new")


@pytest.mark.parametrize("checked", [True, False], ids=["with base", "without base"])
def test_a_layer_without_its_pair_is_named(
    checked: bool, tensors: Tensors, base: Path, tmp_path: Path
) -> None:
    left = {key: tensor for key, tensor in tensors.items() if "layers.0.self_attn.q_proj" not in key}
    source = old_folder(tmp_path / "old", left)
    message = problems_of(source, tmp_path / "new", base_model=str(base) if checked else None)
    assert ("model.layers.0.self_attn.q_proj.lora_A.weight" if checked else "q_proj of layer 0") in message


def test_a_target_without_any_pair_is_named(tensors: Tensors, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", tensors, target_modules=[*TARGETS, "o_proj"])
    assert "no tensors for these target_modules: o_proj" in problems_of(source, tmp_path / "new")


def test_another_base_is_refused_by_names_and_shapes(tensors: Tensors, base: Path, tmp_path: Path) -> None:
    query = PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"
    source = old_folder(tmp_path / "old", {**tensors, query: torch.ones(4, 99)})
    assert "q_proj.lora_A.weight is [4, 99], not [4," in problems_of(
        source, tmp_path / "new", base_model=str(base)
    )
    shutil.rmtree(source)
    source = old_folder(tmp_path / "old", renamed(tensors, "self_attn", "attention"))
    message = problems_of(source, tmp_path / "new", base_model=str(base))
    assert "belong to no target module of tiny" in message
    assert "have no tensor in the adapter" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "with r 8"),
        ({"use_dora": True}, "DoRA cannot be served"),
    ],
)
def test_what_cannot_be_served_is_refused(
    changes: dict[str, Any], message: str, tensors: Tensors, tmp_path: Path
) -> None:
    assert message in problems_of(old_folder(tmp_path / "old", tensors, **changes), tmp_path / "new")


def test_untrained_and_broken_values_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    zero = {key: tensor * (0 if "lora_B" in key else 1) for key, tensor in tensors.items()}
    assert "was it trained" in problems_of(old_folder(tmp_path / "old", zero), tmp_path / "new")


# Whole tensors


def test_whole_tensors_are_left_out_only_if_equal_to_the_base(
    trained: Path, tensors: Tensors, base: Path, tmp_path: Path
) -> None:
    weights = load_file(base / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    tensors |= {
        PREFIX + name: tensor for name, tensor in weights.items()
    }  # as a plain trainer saved all weights
    tensors[PREFIX + "lm_head.weight"] = embeddings.clone()  # tied to the embeddings in the base model
    source = old_folder(tmp_path / "old", tensors)
    convert_adapter(source, tmp_path / "new", base_model=str(base))
    assert (logits(base, tmp_path / "new") - logits(base, trained)).abs().max() == 0

    shutil.rmtree(tmp_path / "new")
    assert "give --base to compare them" in problems_of(source, tmp_path / "new")
    shutil.rmtree(source)
    tensors[PREFIX + "lm_head.weight"] = torch.zeros(4, 4)
    source = old_folder(tmp_path / "old", tensors)
    message = problems_of(source, tmp_path / "new", base_model=str(base))
    assert "'lm_head.weight'" in message
    assert "embed_tokens" not in message
    convert_adapter(source, tmp_path / "new", base_model=str(base), drop=["lm_head.weight"])
    assert (logits(base, tmp_path / "new") - logits(base, trained)).abs().max() == 0


def test_the_error_for_trained_modules_names_merge(tensors: Tensors, base: Path, tmp_path: Path) -> None:
    tensors[PREFIX + "lm_head.modules_to_save.default.weight"] = torch.randn(512, 64)
    source = old_folder(tmp_path / "old", tensors, modules_to_save=["lm_head"])
    assert "python -m training merge" in problems_of(source, tmp_path / "new", base_model=str(base))


# Reward adapters


def scorer(base: Path) -> Any:
    torch.manual_seed(2)  # of the new head
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()


@pytest.mark.parametrize("form", ["", ".modules_to_save.default", ".modules_to_save"])
def test_a_reward_adapter_keeps_its_head(form: str, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="SEQ_CLS"
    )
    model = get_peft_model(scorer(base), config).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "today", save_embedding_layers=False)
    tensors = load_file(tmp_path / "today" / "adapter_model.safetensors")
    tensors[f"{PREFIX}score{form}.weight"] = tensors.pop(PREFIX + "score.weight")
    tensors[f"{PREFIX}score.original_module.weight"] = torch.zeros(1, 64)
    source = old_folder(tmp_path / "old", tensors, task_type="SEQ_CLS")
    convert_adapter(source, tmp_path / "new", base_model=str(base))
    assert validate(tmp_path / "new").provenance.task == "reward"
    again = PeftModel.from_pretrained(scorer(base), tmp_path / "new").eval()
    prompt = torch.arange(3, 23)[None]
    with torch.inference_mode():
        assert torch.equal(again(prompt).logits, model(prompt).logits)


def test_a_reward_adapter_needs_a_head_of_one_number(tensors: Tensors, base: Path, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", tensors, task_type="SEQ_CLS")
    assert "score.weight is missing" in problems_of(source, tmp_path / "new")
    torch.save({**tensors, PREFIX + "score.weight": torch.ones(2, 64)}, source / "adapter_model.bin")
    assert "a reward is one number" in problems_of(source, tmp_path / "new")
    torch.save({**tensors, PREFIX + "score.weight": torch.ones(1, 65)}, source / "adapter_model.bin")
    assert "[1, 65], not (1, 64)" in problems_of(source, tmp_path / "new", base_model=str(base))


# The target folder


def test_nothing_is_overwritten(tensors: Tensors, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", tensors)
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match="is not overwritten"):
        convert_adapter(source, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_safetensors_are_converted_too(trained: Path, tensors: Tensors, base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(trained, tmp_path / "old")
    save_file(renamed(tensors, PREFIX, ""), source / "adapter_model.safetensors")
    convert_adapter(source, tmp_path / "new", base_model=str(base))
    assert (logits(base, tmp_path / "new") - logits(base, trained)).abs().max() == 0
    assert Provenance.model_validate_json((tmp_path / "new" / "provenance.json").read_text()).task == "chat"
