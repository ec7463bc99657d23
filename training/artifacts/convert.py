"""Converts an adapter of another tool or an old PEFT into a folder that can be published."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adapters import (
    GOLDEN_FILE,
    PROVENANCE_FILE,
    InvalidAdapter,
    Provenance,
    fingerprint,
    validate,
    write_golden,
)
from adapters.durable import sha256
from adapters.errors import shown
from adapters.validate import CONFIG_FILE, TEMPLATE_FILE, TENSOR_FILE
from training.artifacts.patterns import spelt_out
from training.artifacts.peft_folder import (
    PREFIX,
    SCORE,
    PeftAdapter,
    inject,
    listed,
    new_folder,
    read_adapter,
    read_template,
)
from training.config import Golden
from training.data import Row
from training.errors import ConfigError
from training.models.base_model import Base, base_folder, base_name
from training.models.golden import golden_prompts, rounding
from training.templates import Template
from training.tokens.stop_tokens import Stops, find_stops

log = logging.getLogger(__name__)


def convert_adapter(
    source: Path,
    target: Path,
    *,
    base_model: str | None = None,
    drop: Collection[str] = (),
    chat_template: Template | None = None,
    golden_rows: list[Row] | None = None,
) -> None:
    """Convert the adapter in the folder `source` into the new folder `target`; `source` stays unchanged.

    `base_model`: a folder or hub id; every tensor name and shape is checked against its config.json. `drop`: settings
    and tensors to leave out. `chat_template`: the one of the adapter's training, if not the base model's.
    `golden_rows`: chats whose questions become golden prompts; only they load the base model's weights.

    Raises InvalidAdapter for an adapter that cannot be read or served, ConfigError if `target` exists or the base
    model cannot be found. `target` does not exist then.
    """
    with new_folder(target) as folder:
        adapter = read_adapter(source, drop)
        adapter = replace(adapter, config=spelt_out(adapter.config, adapter.lora))
        if golden_rows is not None and (base_model is None or adapter.is_reward):
            raise ConfigError(
                "golden prompts need the base model and a chat adapter: give --base, or no golden prompts"
            )
        base = base_folder(base_model) if base_model is not None else None
        skeleton = _skeleton(base, adapter.is_reward) if base else None
        tensors = _servable_tensors(adapter, base, skeleton)
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        if template := chat_template.jinja if chat_template else read_template(source):
            (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        _write_json(folder / CONFIG_FILE, adapter.config)
        stops = _stops(base, template, chat_template.stop if chat_template else ())
        provenance = Provenance(
            stage="external",
            task="reward" if adapter.is_reward else "chat",
            base_model=base_name(base_model) if base_model is not None else None,
            base_fingerprint=_fingerprint(base) if base else None,
            stop=list(stops.texts),
            stop_token_ids=list(stops.token_ids),
            notes=f"converted from {adapter.file.name} with SHA-256 {sha256(adapter.file)}",
        )
        _write_json(folder / PROVENANCE_FILE, provenance.model_dump())
        facts = validate(folder)
        _write_json(folder / CONFIG_FILE, facts.config)
        if base_model is not None:
            inject(skeleton, adapter, base_name(base_model))
            log.info("all tensor names and shapes match %s", base_name(base_model))
        else:
            _check_layers(adapter)
            log.info("give --base to check names and shapes against the base model too")
        if golden_rows is not None and base is not None and base_model is not None:
            named = Base(
                base,
                base_name(base_model),
                provenance.base_fingerprint or "",
                _tokenizer(base, template),
                template,
                stops,
            )
            _write_golden(folder, named, golden_rows, provenance)
        _tell_what_stays(source, adapter.file, template)


def _servable_tensors(adapter: PeftAdapter, base: Path | None, skeleton: Any) -> dict[str, Any]:
    """Return the tensors under PEFT's names. Whole tensors must be the score head or equal the base model's."""
    keep = {SCORE} if adapter.is_reward else set()
    extra = {name: tensor for name, tensor in adapter.whole.items() if name not in keep}
    same = _same_as_base(extra, base, skeleton) if base else set()
    for item in listed("left out, as they equal the base model's: ", same):
        log.info(item)
    if trained := extra.keys() - same:
        raise InvalidAdapter(
            listed(
                "only LoRA pairs can be served, and these are whole tensors. If they were trained, make a new base "
                "model with python -m training merge; if they equal the base model's, give --base to compare them; "
                "or leave them out with --drop NAME: ",
                [shown(name) for name in trained],
            )
        )
    score = adapter.whole.get(SCORE) if adapter.is_reward else None
    hidden = skeleton.score.in_features if score is not None and skeleton is not None else None
    if score is not None and (
        score.dim() != 2 or score.shape[0] != 1 or hidden not in (None, score.shape[1])
    ):
        wanted = f"(1, {hidden or 'hidden size'})"
        raise InvalidAdapter([f"{SCORE} has shape {list(score.shape)}, not {wanted}: a reward is one number"])
    kept = adapter.lora if score is None else {**adapter.lora, SCORE: score}
    return {PREFIX + name: tensor for name, tensor in kept.items()}


def _same_as_base(tensors: dict[str, Any], base: Path, skeleton: Any) -> set[str]:
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    same = set()
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            there = set(opened.keys())
            for name, tensor in tensors.items():
                own = name if name in there else tied.get(name)
                if own in there and torch.equal(opened.get_tensor(own).to(tensor.dtype), tensor):
                    same.add(name)
    return same


def _check_layers(adapter: PeftAdapter) -> None:
    """Check without the base model that each target has a pair in every layer up to the last one with any pair."""
    targets = adapter.config["target_modules"]
    if isinstance(targets, str) or adapter.config.get("layers_to_transform"):
        return
    modules = [name.rpartition(".lora_")[0] for name in adapter.lora]
    last = max((_layer(module) for module in modules), default=-1)
    nowhere, missing = [], []
    for target in targets:
        if _layer(target) >= 0:
            continue  # the full name of a single module
        layers = {_layer(module) for module in modules if f".{module}".endswith(f".{target}")}
        if not layers:
            nowhere.append(target)
        elif max(layers) >= 0:
            missing += [f"{target} of layer {at}" for at in range(last + 1) if at not in layers]
    problems = [
        *listed("no tensors for these target_modules: ", nowhere),
        *listed("no tensors for these; give --base if the model does not have them: ", missing),
    ]
    if problems:
        raise InvalidAdapter(problems)


def _layer(module: str) -> int:
    """Return the number of a module's layer; -1 for a module outside the layers."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), -1)


def _skeleton(base: Path, is_reward: bool) -> Any:
    """Build the base model's modules without weights. Raises ConfigError if transformers does not know its kind."""
    try:
        with torch.device("meta"):
            if is_reward:
                config = AutoConfig.from_pretrained(base, num_labels=1)
                return AutoModelForSequenceClassification.from_config(config)
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base_model: transformers cannot load {base.name} without running code from its folder"
        ) from error


def _fingerprint(base: Path) -> str | None:
    if not any(base.glob("*.safetensors")):
        log.info("%s has no weights here: the adapter gets no base fingerprint", base.name)
        return None
    return fingerprint(base)


def _stops(base: Path | None, template: str | None, texts: Sequence[str]) -> Stops:
    """Return what ends an answer, from the base model's files if they are here."""
    if base is None or not (base / "tokenizer_config.json").is_file():
        return Stops(texts=tuple(texts))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template or tokenizer.chat_template
    return find_stops(base, AutoConfig.from_pretrained(base), tokenizer, texts)


def _tokenizer(base: Path, template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template or tokenizer.chat_template
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"base_model: {base.name} has no chat template: give the one of the adapter's training with --template"
        )
    return tokenizer


def _write_golden(folder: Path, base: Base, rows: list[Row], provenance: Provenance) -> None:
    model = PeftModel.from_pretrained(base.causal_lm(), folder)
    asked = Golden()
    prompts = golden_prompts(
        model, base.tokenizer, rows, asked.prompts, asked.max_new_tokens, stops=base.stops.token_ids
    )
    write_golden(folder / GOLDEN_FILE, prompts)
    dtype = str(model.dtype).removeprefix("torch.")
    told = Provenance(**provenance.model_dump() | {"dtype": dtype, "rounding": rounding(model, prompts)})
    _write_json(folder / PROVENANCE_FILE, told.model_dump())
    log.info("wrote %d golden prompts", len(prompts))


def _tell_what_stays(source: Path, file: Path, template: str | None) -> None:
    used = {CONFIG_FILE, TEMPLATE_FILE, file.name}
    for item in listed(
        "ignored files: ", [shown(path.name) for path in source.iterdir() if path.name not in used]
    ):
        log.info(item)
    if template is None:
        log.info(
            "the adapter has no chat template: the base model's is used, which may differ from that of its training"
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
