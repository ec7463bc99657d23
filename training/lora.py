"""The base model with its tokenizer, and the LoRA adapter to be trained on it."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.config import ConfigError, Lora

_BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def base_folder(base_model: str) -> Path:
    """The folder of a base model, downloaded first if `base_model` is a Hugging Face id.

    Raises ConfigError when it is neither a folder nor a model that the hub, or its cache here, has.
    """
    folder = Path(base_model)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(base_model, allow_patterns=_BASE_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"base_model: {base_model} is no folder here, and the Hugging Face hub cannot give it: {error}"
        ) from error


def base_name(base_model: str) -> str:
    """How a manifest names the base: its hub id, or the last part of its folder, never a host path."""
    return Path(base_model).resolve().name if Path(base_model).is_dir() else base_model


def load_base(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer: bfloat16 on a GPU that knows it, float32 anywhere else.

    Raises ConfigError for a base without a chat template, which cannot hold a conversation.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"base_model: {folder.name} has no chat template; take an instruction-tuned model, or put a "
            "chat_template.jinja into its folder"
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype()), tokenizer


def new_adapter(lora: Lora) -> LoraConfig:
    """A fresh adapter for a causal language model."""
    return LoraConfig(**lora.model_dump(), task_type=TaskType.CAUSAL_LM)


def _dtype() -> torch.dtype:
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
