"""Adapter folders as they were written in 2023."""

import json
import os
from pathlib import Path
from typing import Any

import torch

PREFIX = "base_model.model."
TARGETS = ["q_proj", "v_proj"]
Tensors = dict[str, Any]


def settings(**changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.2 wrote it."""
    return {
        "base_model_name_or_path": "../llama_model", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.05,
        "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 4,
        "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes,
    }  # fmt: skip


def old_folder(folder: Path, tensors: object, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings(**changes)))
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


class Evil:
    """Unpickled with nothing in the way, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)
