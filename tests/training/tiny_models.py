"""Models of many architectures, small and random."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OF_BLOOM = {
    "vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_MERGED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
ARCHITECTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (_SIZE, _LLAMA),
    "qwen2": (_SIZE, _LLAMA),
    "qwen3": (_SIZE, _LLAMA),
    "gemma": (_SIZE, _LLAMA),
    "gemma2": (_SIZE, _LLAMA),
    "mistral": (_SIZE, _LLAMA),
    "phi": (_SIZE, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "phi3": (_SIZE, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "glm": (_SIZE, _MERGED),
    "glm4": (_SIZE, _MERGED),
    "gpt2": (
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
        {"c_attn", "c_proj", "c_fc"},
    ),
    "bloom": (_OF_BLOOM, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
}
"""Settings of each, and what its linear layers are called."""


def tiny_model(architecture: str, attention: str | None = None) -> Any:
    """With weights large enough for every layer to matter."""
    torch.manual_seed(0)
    settings, _ = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(architecture, **settings, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
