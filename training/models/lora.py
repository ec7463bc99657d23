"""The LoRA adapter to train on a base model: new, or continued from a published one."""

import gc
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from transformers.pytorch_utils import Conv1D

from adapters import AdapterStore
from training.config import AdapterJob, Lora
from training.errors import ConfigError
from training.models.base_model import Base, check_base, find_adapter

log = logging.getLogger(__name__)

_LINEAR = (torch.nn.Linear, Conv1D)  # what "all-linear" means to PEFT


def trainable(config: AdapterJob, base: Base, store: AdapterStore) -> dict[str, Any]:
    """Return `model` and `peft_config` for a trainer: a new adapter, or the one that the job continues from.

    Raises ConfigError if that adapter is not published, or was trained on another base model.
    """
    model = base.causal_lm()
    if config.starts_from is None:
        return {"model": model, "peft_config": lora_config(config.lora, TaskType.CAUSAL_LM, model)}
    manifest, folder = find_adapter(store, config.starts_from)
    check_base(manifest, base)
    return {"model": continued(model, base, folder), "peft_config": None}


def continued(model: Any, base: Base, adapter: Path) -> Any:
    """Put a published adapter on `model`, trainable."""
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    # A published adapter names its base model without a path; PEFT would look that name up on the hub.
    adapted.peft_config["default"].base_model_name_or_path = str(base.folder)
    return adapted


def adapted(base: Base, adapter: Path) -> Any:
    """Load the unquantised base model, as a server does, with the adapter of a folder on it."""
    model = PeftModel.from_pretrained(base.causal_lm(plain=True), adapter)
    return model.to("cuda") if torch.cuda.is_available() else model


def lora_config(lora: Lora, task: TaskType, model: Any, modules_to_save: Sequence[str] = ()) -> LoraConfig:
    """Return PEFT's config of a new adapter. Raises ConfigError for modules that `model` does not have."""
    whole = list(dict.fromkeys([*(lora.modules_to_save or ()), *modules_to_save]))
    if lora.target_modules != "all-linear":
        _check_names("lora.target_modules", lora.target_modules, adaptable(model))
    _check_names(
        "lora.modules_to_save", lora.modules_to_save or (), [name for name, _ in model.named_modules()]
    )
    shared = {vocabulary_name(model, side) for side in ("input", "output")} if _is_tied(model) else set()
    return LoraConfig(
        **lora.model_dump(exclude={"modules_to_save"}),
        task_type=task,
        modules_to_save=whole or None,
        ensure_weight_tying=bool(shared & set(whole)),
    )


def adaptable(model: Any) -> list[str]:
    """Return the full names of the linear layers that can get an adapter: all but the heads.

    The loss reads the output head's weight directly, so an adapter on it would never be trained.
    """
    output = model.get_output_embeddings()
    heads = {output, getattr(model, "score", None)}
    return [
        name for name, module in model.named_modules() if isinstance(module, _LINEAR) and module not in heads
    ]


def vocabulary_name(model: Any, side: str) -> str:
    """Return the architecture's name of its `input` or `output` embeddings: embed_tokens, lm_head, wte, ..."""
    found = model.get_input_embeddings() if side == "input" else model.get_output_embeddings()
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is found), "")


def _is_tied(model: Any) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def _check_names(setting: str, asked: Sequence[str], there: Sequence[str]) -> None:
    """Check that each name is a module's full name or the last parts of one. Raises ConfigError."""
    unknown = [name for name in asked if not any(f".{full}".endswith(f".{name}") for full in there)]
    if unknown:
        counts = Counter(full.rpartition(".")[2] for full in there)
        names = ", ".join(name for name in counts if name and not name.isdigit())
        raise ConfigError(f"{setting}: the base model has no {' and no '.join(unknown)}; it has {names}")


def release(model: Any) -> None:
    """Free the memory of a model that is no longer used, even if references to it remain."""
    for module in list(model.modules()):
        module._parameters.clear()
        module._buffers.clear()
        module.__dict__.pop("state", None)  # bitsandbytes keeps a quantised weight there
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
