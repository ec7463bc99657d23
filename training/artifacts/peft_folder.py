"""Reads adapter folders of any PEFT version since 2023 into one form.

A pickle is read as tensors only; a pickle that would build or run anything else is refused before any of it runs.
Each item that is left out or corrected is logged.
"""

import dataclasses
import fcntl
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from adapters import InvalidAdapter, strict_json
from adapters.durable import settle
from adapters.errors import shown
from adapters.validate import CONFIG_FILE, TEMPLATE_FILE, TENSOR_FILE
from training.errors import Busy, ConfigError

log = logging.getLogger(__name__)

BIN_FILE = "adapter_model.bin"
SCORE = "score.weight"
PREFIX = "base_model.model."  # PEFT's prefix of every tensor name in a file

_MAX_CONFIG_BYTES = 1 << 20
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|base_model\.model)\.)+")
_INNER_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.(?:weight|bias)$)")
# Buffers that a base model computes itself, and untouched originals that PEFT keeps beside a trained copy.
_HARMLESS = re.compile(
    r"(.+\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|original_module\..+)"
)
_PARTNER = {
    "lora_A": "lora_B", "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A",
}  # fmt: skip
# Settings of old or other tools that do not change what an adapter computes.
_RUNTIME = {"merge_weights", "unsloth_fixed"}
# Settings that choose an adapter's modules and scale.
_SHAPING = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "use_dora",
}  # fmt: skip
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica"}
_TASKS = {None: False, "CAUSAL_LM": False, "SEQ_CLS": True}


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """One adapter in memory."""

    file: Path
    """The file of the tensors."""
    config: dict[str, Any]
    """adapter_config.json without settings that only old versions of PEFT wrote."""
    lora: dict[str, Any]
    """Tensors as PEFT saves them, without its prefix: `<module>.lora_A.weight`."""
    whole: dict[str, Any]
    """Tensors that replace the base model's own: `<module>.weight`."""
    is_reward: bool


def read_adapter(folder: Path, drop: Collection[str] = ()) -> PeftAdapter:
    """Read an adapter's folder without changing it; `drop` names settings and tensors to leave out.

    Raises InvalidAdapter with all problems of the first step that finds any.
    """
    if not folder.is_dir():
        raise InvalidAdapter(["no such folder: give the folder that contains adapter_config.json"])
    found = _read_config(folder / CONFIG_FILE)
    file, tensors = _read_tensors(folder)
    unused = set(drop) - found.keys() - tensors.keys() - {_WRAPPERS.sub("", key, 1) for key in tensors}
    if unused:
        raise InvalidAdapter(listed("--drop names no setting or tensor: ", sorted(unused)))
    config, is_reward = _clean_config(found, drop)
    lora, whole = _sort(tensors, drop)
    if found.get("enable_lora"):
        lora, config = _widen(lora, config, found["enable_lora"])
    return PeftAdapter(file, config, lora, whole, is_reward)


def read_template(folder: Path) -> str | None:
    """Return the adapter's chat template, or None. Raises InvalidAdapter if it is not text."""
    path = folder / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise InvalidAdapter([f"{TEMPLATE_FILE} is not UTF-8 text"]) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {_MAX_CONFIG_BYTES >> 20} MiB")
        value = strict_json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidAdapter([f"{CONFIG_FILE} is missing or cannot be read"]) from error
    except ValueError as error:
        raise InvalidAdapter([f"{CONFIG_FILE} cannot be read as JSON: {str(error)[:200]}"]) from error
    if not isinstance(value, dict):
        raise InvalidAdapter([f"{CONFIG_FILE} must be a JSON object"])
    return value


def _clean_config(found: Mapping[str, Any], drop: Collection[str]) -> tuple[dict[str, Any], bool]:
    """Return the settings that today's PEFT knows, and whether this is a reward adapter."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    config, left_out, unknown = {}, [], []
    for key, value in found.items():
        if key in _RUNTIME or key in drop or (key not in known and (not value or key == "enable_lora")):
            left_out.append(f"{shown(key)} ({shown(value)})")
        elif key not in known:
            unknown.append(f"{shown(key)} is {shown(value)}")
        else:
            config[key] = value
    problems = listed(
        "unknown settings, which may change what the adapter computes; if they do not, leave them out "
        "(convert-adapter --drop NAME): ",
        unknown,
    )
    if config.get("peft_type") not in (None, "LORA"):
        problems.append(f"peft_type is {shown(config['peft_type'])}: only LORA is supported")
    if (task := config.get("task_type")) not in _TASKS:
        problems.append(f"task_type is {shown(task)}: only CAUSAL_LM and SEQ_CLS are supported")
    if problems:
        raise InvalidAdapter(problems)
    for item in listed(f"{CONFIG_FILE}: left out ", left_out):
        log.info(item)
    alpha = config.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        config["lora_alpha"] = int(alpha)
    return config, _TASKS[task]


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Any]]:
    if (folder / TENSOR_FILE).is_file():
        path = folder / TENSOR_FILE
        try:
            tensors: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InvalidAdapter([f"{TENSOR_FILE} is truncated or not a safetensors file"]) from error
    elif (folder / BIN_FILE).is_file():
        path = folder / BIN_FILE
        tensors = _read_pickle(path)
    else:
        raise InvalidAdapter([f"the folder has neither {TENSOR_FILE} nor {BIN_FILE}"])
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise InvalidAdapter([f"{path.name} is not a dictionary of tensors by name"])
    if not tensors:
        raise InvalidAdapter(
            [
                f"{path.name} contains no tensors, so the trained weights are not in it. Some training scripts of "
                "2023 saved such files by mistake: use a checkpoint of that run"
            ]
        )
    strange = [shown(key) for key, value in tensors.items() if not _is_plain(value, path.stat().st_size)]
    if strange:
        raise InvalidAdapter(listed(f"{path.name}: these are not plain tensors: ", strange))
    log.info("read %s: %d tensors", path.name, len(tensors))
    return path, {key: value.detach() for key, value in tensors.items()}


def _read_pickle(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if is_packed:  # torch never compresses, and a small file could fill the memory
            raise InvalidAdapter([f"{path.name} is compressed, which torch.save never does"])
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InvalidAdapter(
            [
                f"{path.name} contains more than tensors{f' ({named[1]})' if named else ''}, which would run as "
                "code: none of it was run. Ask its author for a safetensors file"
            ]
        ) from error
    except InvalidAdapter:
        raise
    except Exception as error:  # a damaged or hostile file may make the reader raise anything
        raise InvalidAdapter(
            [f"{path.name} is damaged or was not written by torch.save: {type(error).__name__}"]
        ) from error


def _is_plain(value: object, file_bytes: int) -> bool:
    """Return whether this is a dense tensor that is not larger than its file, such as by expansion."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= file_bytes
    )


def _sort(tensors: Mapping[str, Any], drop: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split tensors into LoRA pairs and whole ones, both under today's names without PEFT's prefix."""
    lora: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    names, left_out, twice = set(), [], []
    renamed = 0
    for key, tensor in tensors.items():
        bare = _WRAPPERS.match(key)
        name = _INNER_WRAPPERS.sub("", key[bare.end() :] if bare else key)
        if key in drop or name in drop or _HARMLESS.fullmatch(name):
            left_out.append(shown(key))
            continue
        if match := _LORA.fullmatch(name):
            plain = match["part"] in ("lora_A", "lora_B")
            name = f"{match['module']}.{match['part']}" + (".weight" if plain else "")
            names.add(match["adapter"])
            into = lora
        else:
            name = _SAVED.sub("", name).replace(".base_layer.", ".").replace(".default.", ".")
            into = whole
        if name in into:
            twice.append(shown(key))
        into[name] = tensor.contiguous()
        renamed += key != PREFIX + name
    if problems := _check_halves(lora) + listed("other names of the same tensor: ", twice):
        raise InvalidAdapter(problems)
    if len(names) > 1:
        raise InvalidAdapter(
            [f"it contains several adapters, {shown(sorted(map(str, names)))}: save each to its own folder"]
        )
    for item in listed("left out, as unused or named by --drop: ", left_out):
        log.info(item)
    if renamed:
        log.info("renamed %d tensors to PEFT's current names", renamed)
    return lora, whole


def _check_halves(lora: Mapping[str, Any]) -> list[str]:
    alone = []
    for name in lora:
        module, part = _split(name)
        if part in _PARTNER and name.replace(part, _PARTNER[part]) not in lora:
            alone.append(f"{module} has only {part}")
    return [
        *listed("incomplete LoRA pairs: ", alone),
        *([] if lora else ["it contains no LoRA pair, so it would change nothing"]),
    ]


def _split(name: str) -> tuple[str, str]:
    """Split `a.b.lora_A.weight` into `a.b` and `lora_A`."""
    module, _, part = name.removesuffix(".weight").rpartition(".")
    return module, part


def _widen(
    lora: Mapping[str, Any], config: Mapping[str, Any], enabled: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert PEFT 0.2's `enable_lora`, one adapter per enabled part of a fused layer, to one adapter of joint rank.

    Each part has `r` rows of A and its own rows of B; the joint B is zero outside a part's own block.
    """
    r, alpha = config.get("r"), config.get("lora_alpha")
    parts = [at for at, on in enumerate(enabled) if on] if isinstance(enabled, list) else []
    if not parts or type(r) is not int or not isinstance(alpha, int | float):
        raise InvalidAdapter([f"enable_lora is {shown(enabled)}: it must be a list that enables a part"])
    wide: dict[str, Any] = {}
    wrong = []
    for module in sorted({_split(name)[0] for name in lora}):
        a, b = lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"]
        b = b.squeeze(-1) if b.dim() == 3 else b
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != r * len(parts) or b.shape[1] != r:
            wrong.append(f"{module} has A {list(a.shape)} and B {list(b.shape)}")
            continue
        rows = b.shape[0] // len(parts)
        joint = b.new_zeros(rows * len(enabled), r * len(parts))
        for at, part in enumerate(parts):
            joint[part * rows : (part + 1) * rows, at * r : (at + 1) * r] = b[at * rows : (at + 1) * rows]
        wide |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": joint}
    if wrong:
        raise InvalidAdapter(
            listed(
                f"enable_lora is {shown(enabled)} with r {r}, but these have other shapes, so their parts are "
                "unknown: ",
                wrong,
            )
        )
    log.info(
        "enable_lora %s: joined %d parts of rank %d into one of rank %d",
        enabled,
        len(parts),
        r,
        r * len(parts),
    )
    return wide, {**config, "r": r * len(parts), "lora_alpha": alpha * len(parts)}


def inject(model: Any, adapter: PeftAdapter, base: str) -> Any:
    """Return a PeftModel on `model` with modules for the adapter, after checking that they match its tensors exactly.

    Raises InvalidAdapter with the missing tensors, those without a module and those of another shape.
    """
    config = adapter.config
    init = config.get("init_lora_weights")
    problems = [
        f"{key} is set: adapters with it are not supported"
        for key, value in config.items()
        if value and key not in _SHAPING | _SILENT
    ]
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        problems.append(f"init_lora_weights is {shown(init)}: it needs a modified base model")
    if problems:
        raise InvalidAdapter(problems)
    try:
        shaping = {key: value for key, value in config.items() if key in _SHAPING and value is not None}
        if hasattr(model, "score"):  # the score head is a linear layer, but not one of "all-linear"
            excluded = config.get("exclude_modules") or []
            shaping["exclude_modules"] = (
                f"{excluded}|score" if isinstance(excluded, str) else [*excluded, "score"]
            )
        peft_model = get_peft_model(model, LoraConfig(**shaping), low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise InvalidAdapter([f"{CONFIG_FILE} does not fit {base}: {shown(str(error))}"]) from error
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    shapes = {name.removeprefix(PREFIX): list(tensor.shape) for name, tensor in wanted.items()}
    lora = adapter.lora
    problems = [
        *listed(f"these modules of {base} have no tensor in the adapter: ", shapes.keys() - lora.keys()),
        *listed(f"these tensors belong to no target module of {base}: ", lora.keys() - shapes.keys()),
        *listed(
            f"these tensors have other shapes than {base}: ",
            [
                f"{name} is {list(tensor.shape)}, not {shapes[name]}"
                for name, tensor in lora.items()
                if name in shapes and list(tensor.shape) != shapes[name]
            ],
        ),
    ]
    if problems:
        raise InvalidAdapter(problems)
    return peft_model


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; then move it to `target`, complete and durable. On an error, `target` does not appear.

    Raises ConfigError if `target` exists: nothing is overwritten. Raises Busy if another process writes it.
    """
    if target.exists():
        raise ConfigError(f"{target.name} already exists and is not overwritten: give another folder")
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system if this process dies
    except BlockingIOError as error:
        os.close(held)
        raise Busy(f"{target.name} is being written by another process: retry later") from error
    try:
        for left in partial.iterdir():  # from a killed process
            left.unlink()
        yield partial
        settle(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


def listed(sentence: str, items: Collection[str], most: int = 5) -> list[str]:
    """Return the sentence with the first `most` items, or nothing without items."""
    named: Sequence[str] = sorted(items)[:most]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return [sentence + ", ".join(named) + more] if named else []
