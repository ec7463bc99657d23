import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from adapters import AdapterNotFound, AdapterStore, InvalidAdapter, Provenance, fingerprint
from training.artifacts.merge import export_adapter, merge
from training.errors import ConfigError

PROMPT = torch.arange(3, 23)[None]
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tiny_dir: Path) -> Path:
    return tiny_dir / "models" / "tiny"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence PEFT's warning about adapters on tied embeddings: these tests check that merging them is correct."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def trained(base: Path, folder: Path, *, seed: int, reward: bool = False, **settings: Any) -> Path:
    """Write an adapter folder as a trainer does, with random weights."""
    torch.manual_seed(seed)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model = kind.from_pretrained(base, **({"num_labels": 1} if reward else {}))
    config = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False,
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM", **settings,
    }  # fmt: skip
    with quiet_peft():
        model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.add_(torch.randn_like(value) / 10)
    model.save_pretrained(folder, save_embedding_layers=False)
    provenance = Provenance(
        stage="sft",
        task="reward" if reward else "chat",
        base_model="tiny",
        base_fingerprint=fingerprint(base),
    )
    (folder / "provenance.json").write_text(provenance.model_dump_json())
    return folder


def publish(store: AdapterStore, folder: Path, name: str) -> str:
    manifest = store.publish(folder, name, actor="test")
    store.set_alias(name, "default", manifest.revision, actor="test")
    return manifest.revision


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(PROMPT).logits


def merged_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def adapter_logits(base: Path, folder: Path) -> torch.Tensor:
    with quiet_peft():
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, atol=2e-5, rtol=1e-5)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_merged_model_equals_base_and_adapter(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1)
    revision = publish(store, folder, "doctor")
    target = tmp_path / "models" / "tiny-doctor"
    merge(str(base), ["doctor"], target, store)
    assert close(merged_logits(target), adapter_logits(base, folder))
    assert not close(merged_logits(target), merged_logits(base))
    messages = [{"role": "user", "content": "hello"}]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, target)]
    assert len({str(t.apply_chat_template(messages, return_dict=False)) for t in tokenizers}) == 1
    assert (target / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert fingerprint(target) == fingerprint(base)
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}
    assert json.loads((target / "xinglin_merge.json").read_text()) == {
        "base_model": "tiny",
        "base_fingerprint": fingerprint(base),
        "task": "chat",
        "dtype": "float32",
        "adapters": [
            {
                "ref": f"doctor@{revision}",
                "tensors_sha256": store.revisions("doctor")[0].tensor_digest,
                "base_fingerprint": fingerprint(base),
                "scales": [2.0],
                "replaced": [],
            }
        ],
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["norm"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_every_kind_of_adapter(
    settings: dict[str, Any], base: Path, store: AdapterStore, tmp_path: Path
) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1, **settings)
    merge(str(base), [str(folder)], tmp_path / "merged", store)
    assert close(merged_logits(tmp_path / "merged"), adapter_logits(base, folder))


def test_an_adapter_on_the_head_does_not_change_tied_embeddings(
    base: Path, store: AdapterStore, tmp_path: Path
) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1, modules_to_save=["lm_head"])
    merge(str(base), [str(folder)], tmp_path / "merged", store)
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(tmp_path / "merged")[name], weights(base)[name])
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"]


# Several adapters


def test_pairs_add_up_in_any_order(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    sums = weights(base)[QUERY].double()
    for name, seed in (("first", 1), ("second", 2)):
        publish(store, trained(base, tmp_path / name, seed=seed), name)
        pair = load_file(tmp_path / name / "adapter_model.safetensors")
        module = "base_model.model." + QUERY.removesuffix(".weight")
        sums = sums + 2 * pair[f"{module}.lora_B.weight"].double() @ pair[f"{module}.lora_A.weight"].double()
    merge(str(base), ["first", "second"], tmp_path / "one", store)
    merge(str(base), ["second", "first"], tmp_path / "other", store)
    torch.testing.assert_close(weights(tmp_path / "one")[QUERY].double(), sums, atol=1e-5, rtol=1e-5)
    assert close(merged_logits(tmp_path / "one"), merged_logits(tmp_path / "other"))
    assert not close(merged_logits(tmp_path / "one"), adapter_logits(base, tmp_path / "first"))
    order = json.loads((tmp_path / "other" / "xinglin_merge.json").read_text())["adapters"]
    assert [one["ref"].partition("@")[0] for one in order] == ["second", "first"]


def test_the_last_whole_module_wins(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    folders = [trained(base, tmp_path / f"a{n}", seed=n, modules_to_save=["lm_head"]) for n in (1, 2)]
    for target, order in (("one", folders), ("other", folders[::-1])):
        merge(str(base), [str(folder) for folder in order], tmp_path / target, store)
        saved = load_file(order[-1] / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
        assert torch.equal(weights(tmp_path / target)["lm_head.weight"], saved)
    assert torch.allclose(weights(tmp_path / "one")[QUERY], weights(tmp_path / "other")[QUERY], atol=1e-6)
    assert not close(merged_logits(tmp_path / "one"), merged_logits(tmp_path / "other"))


def test_the_last_chat_template_wins(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("second", 2), ("third", 3)):
        folder = trained(base, tmp_path / name, seed=seed)
        if name != "third":
            (folder / "chat_template.jinja").write_text(f"{name} {{{{ messages[0].content }}}}")
        publish(store, folder, name)
    merge(str(base), ["first", "second", "third"], tmp_path / "merged", store)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert rendered == "second hello"


# Number formats


def test_it_is_computed_in_float32_and_rounded_once(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    folders = [str(trained(base, tmp_path / f"a{n}", seed=n)) for n in (1, 2)]
    merge(str(half), folders, tmp_path / "as-base", store)
    merge(str(half), folders, tmp_path / "exact", store, dtype="float32")
    rounded, exact = weights(tmp_path / "as-base"), weights(tmp_path / "exact")
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    assert {value.dtype for value in exact.values()} == {torch.float32}
    assert torch.equal(rounded[QUERY], exact[QUERY].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "as-base", dtype="auto").dtype == torch.bfloat16


# Vocabulary


def test_a_larger_vocabulary_needs_its_tokenizer(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1, modules_to_save=["embed_tokens", "lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.randn(
            520, tensors[f"base_model.model.{name}.weight"].shape[1]
        )
    save_file(tensors, file)
    with pytest.raises(InvalidAdapter, match="no tokenizer for it"):
        merge(str(base), [str(folder)], tmp_path / "merged", store)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<word{n}>" for n in range(8)])
    tokenizer.save_pretrained(folder)
    merge(str(base), [str(folder)], tmp_path / "merged", store)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == 520
    assert torch.equal(model.lm_head.weight, tensors["base_model.model.lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["base_model.model.model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<word7>").input_ids == [519]

    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(InvalidAdapter, match="not of both embeddings and head"):
        merge(str(base), [str(folder)], tmp_path / "other", store)


# Reward


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_a_reward_adapter_makes_a_reward_model(
    modules: Any, base: Path, store: AdapterStore, tmp_path: Path
) -> None:
    publish(store, trained(base, tmp_path / "judge", seed=3, reward=True, target_modules=modules), "judge")
    merge(str(base), ["judge"], tmp_path / "merged", store)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    scorer = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    expected = logits(PeftModel.from_pretrained(scorer, tmp_path / "judge"))
    assert merged.config.num_labels == 1
    assert close(logits(merged), expected)
    batch = PROMPT.repeat(2, 1)
    with torch.inference_mode():
        assert merged(batch).logits.shape == (2, 1)
    assert json.loads((tmp_path / "merged" / "xinglin_merge.json").read_text())["task"] == "reward"

    publish(store, trained(base, tmp_path / "doctor", seed=1, target_modules=modules), "doctor")
    merge(str(base), ["doctor", "judge"], tmp_path / "both", store)
    assert not close(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "both")), expected)
    with pytest.raises(ConfigError, match="one score head"):
        merge(str(base), ["judge", "judge"], tmp_path / "third", store)


# Old folders


def test_an_adapter_of_2023_with_a_trained_head_can_be_merged(
    base: Path, store: AdapterStore, tmp_path: Path
) -> None:
    folder = trained(base, tmp_path / "today", seed=1, modules_to_save=["lm_head"])
    expected = adapter_logits(base, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    head = tensors.pop("base_model.model.lm_head.weight")
    tensors["base_model.model.lm_head.modules_to_save.default.weight"] = head
    config = json.loads((folder / "adapter_config.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    torch.save(tensors, old / "adapter_model.bin")
    (old / "adapter_config.json").write_text(
        json.dumps({**config, "enable_lora": None, "merge_weights": False})
    )
    merge(str(base), [str(old)], tmp_path / "merged", store)
    assert close(merged_logits(tmp_path / "merged"), expected)


# Refused


def test_an_adapter_of_another_base_is_refused(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1)
    (folder / "provenance.json").write_text(
        Provenance(stage="sft", base_model="other", base_fingerprint="0123456789abcdef").model_dump_json()
    )
    publish(store, folder, "doctor")
    with pytest.raises(
        ConfigError, match=r"fingerprint 0123456789abcdef, and tiny has \w+: give that base model"
    ):
        merge(str(base), ["doctor"], tmp_path / "merged", store)
    assert not (tmp_path / "merged").exists()
    merge(str(base), ["doctor"], tmp_path / "merged", store, any_base=True)
    assert close(merged_logits(tmp_path / "merged"), adapter_logits(base, folder))


def test_an_adapter_that_lacks_a_layer_is_refused(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({key: value for key, value in whole.items() if "layers.1.self_attn.q_proj" not in key}, file)
    with pytest.raises(
        InvalidAdapter, match=r"have no tensor in the adapter: model\.layers\.1\.self_attn\.q_proj\.lora_A"
    ):
        merge(str(base), [str(folder)], tmp_path / "merged", store)
    stranger = {**whole, "base_model.model.model.other.weight": torch.ones(2)}
    save_file(stranger, file)
    with pytest.raises(
        InvalidAdapter, match=r"not in tiny, or have another shape there: model\.other\.weight"
    ):
        merge(str(base), [str(folder)], tmp_path / "merged", store)
    save_file({key: value * float("nan") for key, value in whole.items()}, file)
    with pytest.raises(InvalidAdapter, match="NaN or infinity"):
        merge(str(base), [str(folder)], tmp_path / "merged", store)
    assert not (tmp_path / "merged").exists()


def test_missing_sources_and_existing_targets_are_refused(
    base: Path, store: AdapterStore, tmp_path: Path
) -> None:
    with pytest.raises(AdapterNotFound, match="doctor@default"):
        merge(str(base), ["doctor"], tmp_path / "merged", store)
    with pytest.raises(InvalidAdapter, match="no such folder"):
        merge(str(base), ["./doctor"], tmp_path / "merged", store)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="not overwritten"):
        merge(str(base), ["./doctor"], tmp_path / "merged", store)


def test_a_quantised_base_is_refused(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    folder = trained(base, tmp_path / "doctor", seed=1)
    with pytest.raises(ConfigError, match="quantised"):
        merge(str(quantised), [str(folder)], tmp_path / "merged", store)


KILLED = """
import os, signal, sys
from pathlib import Path
from training.artifacts import merge
from adapters import AdapterStore
merge._copy = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # only the weights are written then
merge.merge(sys.argv[1], [sys.argv[2]], Path(sys.argv[3]), AdapterStore(Path("store")))
"""


def test_a_kill_leaves_nothing_at_the_target(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1)
    target = tmp_path / "models" / "merged"
    command = [sys.executable, "-c", KILLED, str(base), str(folder), str(target)]
    killed = subprocess.run(command, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in target.parent.iterdir()] == [".merged.partial"]
    assert (target.parent / ".merged.partial" / "model.safetensors").exists()
    merge(str(base), [str(folder)], target, store)
    assert [path.name for path in target.parent.iterdir()] == ["merged"]
    assert close(merged_logits(target), adapter_logits(base, folder))


# A plain folder


def test_export_writes_what_peft_would(base: Path, store: AdapterStore, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "doctor", seed=1)
    publish(store, folder, "doctor")
    export_adapter("doctor", tmp_path / "plain", store)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert torch.equal(adapter_logits(base, tmp_path / "plain"), adapter_logits(base, folder))
    with pytest.raises(AdapterNotFound):
        export_adapter("nobody", tmp_path / "other", store)
    assert not (tmp_path / "other").exists()
