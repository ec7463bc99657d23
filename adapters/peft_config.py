"""adapter_config.json: the PEFT settings that can be served, and the canonical form that a revision keeps."""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from adapters.errors import shown

# The values that vLLM allows for max_lora_rank.
_ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MAX_ALPHA = 1e4  # trained adapters stay below 1000; a huge scale overflows
MAX_PATTERNS = 500  # engines try each one on every module, and cache about this many compiled
_LITERAL = re.compile(r"[A-Za-z0-9_.]{1,200}")

_KEPT = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout", "fan_in_fan_out", "bias",
    "init_lora_weights", "eva_config", "task_type",
}  # fmt: skip
# Settings that do not change what the adapter computes.
_LEFT_OUT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "unsloth_fixed", "velora_config",
}  # fmt: skip
# Settings with which the adapter is not base + scale * B * A, or not only that.
_UNSERVABLE = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA bias",
    "alora_invocation_tokens": "Activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
    "megatron_config": "Megatron LoRA",
}
# All others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base model, and the saved pairs are relative to the
# changed one.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica"}
_SCORE_HEADS = {"score", "classifier"}


def check_config(config: Mapping[str, Any], *, is_reward: bool, max_lora_rank: int | None) -> list[str]:
    """Return every reason why an adapter with this config cannot be served."""
    problems = []
    if config.get("peft_type") not in (None, "LORA"):
        problems.append(f"peft_type is {shown(config['peft_type'])}: only LORA can be served")
    r, alpha, init = config.get("r"), config.get("lora_alpha"), config.get("init_lora_weights")
    if not _is_rank(r):
        problems.append(f"r is {shown(r)}: it must be a whole number from 1 to {_ENGINE_RANKS[-1]}")
    elif max_lora_rank is not None and r > max_lora_rank:
        problems.append(_rank_too_high(f"r is {r}", r, max_lora_rank))
    if not _is_alpha(alpha):
        problems.append(f"lora_alpha is {shown(alpha)}: it must be a number above 0, {_MAX_ALPHA:g} at most")
    if config.get("use_rslora") not in (None, True, False):
        problems.append(f"use_rslora is {shown(config['use_rslora'])}: it must be true or false")
    if config.get("bias") not in (None, "none"):
        problems.append(
            f"bias is {shown(config['bias'])}: trained biases cannot be served; train with bias: none"
        )
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        problems.append(
            f"init_lora_weights is {shown(init)}: it also changes the base model; convert the adapter with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    problems += [
        f"{key} is set: {feature} cannot be served; train without it, or merge it into the base model"
        for key, feature in _UNSERVABLE.items()
        if config.get(key)
    ]
    known = _KEPT | _LEFT_OUT | _UNSERVABLE.keys()
    if unknown := sorted(key for key, value in config.items() if value and key not in known):
        problems.append(f"unknown settings, which may change what the adapter computes: {shown(unknown)}")
    problems += _check_saved_modules(config, is_reward)
    problems += _check_module_names(config)
    return problems + _check_patterns(config, max_lora_rank)


def _check_saved_modules(config: Mapping[str, Any], is_reward: bool) -> list[str]:
    saved = config.get("modules_to_save") or []
    if not is_reward and saved:
        return [f"modules_to_save is {shown(saved)}: whole modules cannot be served for chat; merge them"]
    if not isinstance(saved, list) or not all(name in _SCORE_HEADS for name in map(str, saved)):
        return [f"modules_to_save is {shown(saved)}: a reward adapter may save only its score head"]
    return []


def _check_module_names(config: Mapping[str, Any]) -> list[str]:
    """Refuse all but plain names, since PEFT matches these as regular expressions."""
    problems = []
    if not config.get("target_modules"):
        problems.append("target_modules is missing: it must be a list of module names")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key) or []
        names = [value] if isinstance(value, str) else value
        if key == "target_modules" and value == "all-linear":
            continue
        if not isinstance(names, list) or not all(is_plain_name(name) for name in names):
            problems.append(f"{key} must be plain module names, no regular expressions")
        elif len(names) > MAX_PATTERNS:
            problems.append(f"{key} has {len(names)} names: at most {MAX_PATTERNS} are allowed")
    return problems


def _check_patterns(config: Mapping[str, Any], max_lora_rank: int | None) -> list[str]:
    """Refuse all but plain names, since engines match these keys as regular expressions."""
    problems = []
    for key, is_proper in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or len(pattern) > MAX_PATTERNS:
            problems.append(f"{key} must be an object of at most {MAX_PATTERNS} module names")
            continue
        if strange := [name for name in pattern if not is_plain_name(name)]:
            problems.append(f"{key} must hold plain module names, no regular expressions: {shown(strange)}")
        if wrong := {name: value for name, value in pattern.items() if not is_proper(value)}:
            problems.append(f"{key} must hold numbers allowed for r or lora_alpha: {shown(wrong)}")
        elif key == "rank_pattern" and max_lora_rank is not None and pattern:
            name, rank = max(pattern.items(), key=lambda item: int(item[1]))
            if rank > max_lora_rank:
                found = f"rank_pattern gives {shown(name)} rank {rank}"
                problems.append(_rank_too_high(found, rank, max_lora_rank))
    return problems


def expected_rank(module: str, config: Mapping[str, Any]) -> int | None:
    """Return the rank PEFT gives `module`: from the first key of rank_pattern that is a dotted suffix of it, else r."""
    pattern = config.get("rank_pattern")
    for name, rank in pattern.items() if isinstance(pattern, dict) else ():
        if f".{module}".endswith(f".{name}"):
            return rank if _is_rank(rank) else None
    r = config.get("r")
    return r if _is_rank(r) else None


def canonical(config: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """Return the canonical config: equal for equal adapters, without host paths and settings that have no effect."""
    kept = {
        key: value for key, value in sorted(config.items()) if key in _KEPT and value not in (None, [], {})
    }
    for key in ("target_modules", "exclude_modules"):  # sets in PEFT, saved in any order
        if isinstance(kept.get(key), list):
            kept[key] = sorted(set(kept[key]))
    # The first matching pattern wins, so their order stays.
    return {"base_model_name_or_path": base_model, "inference_mode": True, "peft_type": "LORA", **kept}


def is_plain_name(name: object) -> bool:
    """Check that it is a module name and not a regular expression."""
    return isinstance(name, str) and _LITERAL.fullmatch(name) is not None


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= _ENGINE_RANKS[-1]


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX_ALPHA


def _rank_too_high(found: str, rank: int, max_lora_rank: int) -> str:
    enough = next(allowed for allowed in _ENGINE_RANKS if allowed >= rank)
    return (
        f"{found}, above max_lora_rank {max_lora_rank}: start the service with XINGLIN_MAX_LORA_RANK={enough}"
    )
