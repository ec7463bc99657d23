"""adapters/fingerprint.py: copies with equal and with different fingerprints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import AdapterError, fingerprint
from tests.adapters.folders import safetensors, with_header

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 3,
}
TOKENIZER = {
    "added_tokens": [{"id": 2, "content": "<end>", "special": True}],
    "model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
}
TENSORS = {"embed": np.ones((3, 8), np.float32), "layers.0.q_proj": np.ones((8, 8), np.float32)}

Change = Callable[[Path], Any]


def save(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "model.safetensors").write_bytes(safetensors(TENSORS))
    return folder


def rewrite(name: str, content: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def weights(tensors: dict[str, np.ndarray]) -> Change:
    return lambda folder: (folder / "model.safetensors").write_bytes(safetensors(tensors))


def in_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(reversed(TENSORS.items())):
        (folder / f"model-{number}.safetensors").write_bytes(safetensors({name: tensor}))


SAME: dict[str, Change] = {
    "another dtype": weights({name: tensor.astype(np.float16) for name, tensor in TENSORS.items()}),
    "other values": weights({name: tensor * 2 for name, tensor in TENSORS.items()}),
    "in shards": in_shards,
    "keys that library versions add": rewrite(
        "config.json",
        {
            **CONFIG, "transformers_version": "5.19.0", "dtype": "float16", "head_dim": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "tokenizer.json saved after training": rewrite(
        "tokenizer.json",
        {
            **TOKENIZER,
            "padding": {"strategy": "BatchLongest"},
            "model": {"vocab": {"b": 1, "a": 0}, "merges": [["a", "b"]], "dropout": None},
        },
    ),
    "a chat template": lambda folder: (folder / "chat_template.jinja").write_text("x"),
}  # fmt: skip
OTHER: dict[str, Change] = {
    "another architecture": rewrite("config.json", {**CONFIG, "architectures": ["Qwen3ForCausalLM"]}),
    "another size": rewrite("config.json", {**CONFIG, "hidden_size": 16}),
    "other heads": rewrite("config.json", {**CONFIG, "num_attention_heads": 4}),
    "another vocabulary": rewrite("tokenizer.json", {**TOKENIZER, "model": {"vocab": {"a": 1, "b": 0}}}),
    "other added tokens": rewrite(
        "tokenizer.json", {**TOKENIZER, "added_tokens": [{"id": 2, "content": "<eos>"}]}
    ),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "another shape": weights({**TENSORS, "embed": np.ones((4, 8), np.float32)}),
    "another tensor": weights({**TENSORS, "lm_head": np.ones((3, 8), np.float32)}),
    "a renamed tensor": weights(
        {"embed_tokens": TENSORS["embed"], "layers.0.q_proj": TENSORS["layers.0.q_proj"]}
    ),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_copies_of_one_base_model_agree(tmp_path: Path, change: Change) -> None:
    one, copy = save(tmp_path / "one"), save(tmp_path / "copy")
    change(copy)
    assert fingerprint(copy) == fingerprint(one)


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_another_base_model_differs(tmp_path: Path, change: Change) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other")
    change(other)
    assert fingerprint(other) != fingerprint(one)


def test_a_tokenizer_without_tokenizer_json_counts(tmp_path: Path) -> None:
    digests = set()
    for content in ("one", "two"):
        folder = save(tmp_path / content)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_text(content)
        digests.add(fingerprint(folder))
    assert len(digests) == 2


def test_it_is_16_hexadecimal_digits(tmp_path: Path) -> None:
    digits = fingerprint(save(tmp_path / "one"))
    assert len(digits) == 16
    assert int(digits, 16) >= 0


BROKEN: dict[str, Change] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a list for a config": rewrite("config.json", []),
    "torn config": lambda folder: (folder / "config.json").write_text("{"),
    "torn tokenizer": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"),
    "no vocabulary": rewrite("tokenizer.json", {"added_tokens": []}),
    "strange tokenizer": rewrite("tokenizer.json", {"added_tokens": 5}),
    "no tensors": lambda folder: (folder / "model.safetensors").unlink(),
    "torn tensors": lambda folder: (folder / "model.safetensors").write_bytes(
        with_header(b"{}", b"left over")
    ),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_error_names_the_folder_without_its_path(tmp_path: Path, change: Change) -> None:
    folder = save(tmp_path / "llama")
    change(folder)
    with pytest.raises(AdapterError) as caught:
        fingerprint(folder)
    assert str(caught.value).startswith("llama")
    assert str(tmp_path) not in str(caught.value)
