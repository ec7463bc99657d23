"""Replaces regular expressions in adapter_config.json, as of Unsloth, ms-swift and axolotl, by module names.

Engines read only names. The modules and their ranks come from the tensors; a module's alpha is PEFT's choice: the first
expression in alpha_pattern that matches the module's name, or its end after a dot.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from adapters.peft_config import MAX_PATTERNS, is_plain_name

log = logging.getLogger(__name__)

_A = ".lora_A.weight"
_CHOOSING = ("target_modules", "exclude_modules", "layers_pattern")


def spelt_out(config: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with names only; unchanged if it has no expressions.

    `lora`: the tensors, with `<module>.lora_A.weight` of shape (r, in) among them.
    """
    if not any(_is_expression(config.get(key)) for key in (*_CHOOSING, "rank_pattern", "alpha_pattern")):
        return dict(config)
    ranks = {
        name.removesuffix(_A): int(tensor.shape[0]) for name, tensor in lora.items() if name.endswith(_A)
    }
    alphas = config.get("alpha_pattern") or {}
    of_all = config.get("lora_alpha")
    alpha_of = {module: alphas.get(get_pattern_key(list(alphas), module), of_all) for module in ranks}
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.get("r")
    found = {key: value for key, value in config.items() if key not in (*_CHOOSING, "layers_to_transform")}
    log.info(
        "target_modules and patterns: replaced regular expressions by the names of %d modules", len(ranks)
    )
    return {
        **found,
        "r": r,
        "target_modules": _names(sorted(ranks)),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {module: alpha for module, alpha in alpha_of.items() if alpha != of_all},
    }


def _names(modules: list[str]) -> list[str]:
    """Return full names; only their last parts if a config may not list that many."""
    return modules if len(modules) <= MAX_PATTERNS else sorted({name.rpartition(".")[2] for name in modules})


def _is_expression(value: Any) -> bool:
    if value is None or value == "all-linear":
        return False
    return not all(is_plain_name(name) for name in ([value] if isinstance(value, str) else value))
