"""Validate an adapter folder: return its facts, or all problems at once. Every adapter passes here before an engine.

Needs no torch and does not trust the folder: regular files with allow-listed names only, bounded JSON, tensors checked
by name, shape, dtype and value. Stock vLLM may silently serve wrong answers or crash on the adapters refused here.
"""

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapters import strict_json
from adapters.durable import sha256
from adapters.errors import InvalidAdapter, shown
from adapters.golden import GOLDEN_FILE, read_golden
from adapters.manifest import MANIFEST_FILE, PROVENANCE_FILE, Manifest, Provenance
from adapters.peft_config import canonical, check_config, expected_rank
from adapters.tensors import READABLE, BadTensors, TensorSpec, read_header, read_peaks
from adapters.wording import in_words

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "chat_template.jinja"

# Files that trainers leave beside an adapter; never read or copied.
_LEFT_BEHIND = {
    "README.md", ".gitattributes", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
    "config.json", "trainer_state.json", "training_args.bin", "LICENSE",
}  # fmt: skip
_ALLOWED = _LEFT_BEHIND | {
    CONFIG_FILE, TENSOR_FILE, TEMPLATE_FILE, GOLDEN_FILE, PROVENANCE_FILE, MANIFEST_FILE
}  # fmt: skip

_MAX_JSON_BYTES = 1 << 20
_MAX_TEMPLATE_BYTES = 256 << 10
_MAX_MAGNITUDE = 1e3  # trained LoRA values stay below 10; beyond this, products overflow half precision
_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]{1,200})\.lora_(?P<half>[AB])\.weight")
_SCORE_KEY = "base_model.model.score.weight"


@dataclass(frozen=True)
class BaseModelFacts:
    """The base model's facts that an adapter is checked against."""

    name: str
    fingerprint: str
    module_shapes: Mapping[str, tuple[int, int]]
    """Module path, as in the Hugging Face model, to (in_features, out_features)."""
    max_lora_rank: int


@dataclass(frozen=True)
class AdapterFacts:
    """Facts of a valid adapter. `config` is the canonical adapter_config.json, without host paths."""

    provenance: Provenance
    r: int
    lora_alpha: float
    target_modules: list[str]
    golden_prompts: int
    config: dict[str, Any]
    files: list[str]
    """Names of the revision's files, without adapter_config.json and the manifest."""


def validate(folder: Path, base: BaseModelFacts | None = None) -> AdapterFacts:
    """Check everything that needs no engine; with `base`, also that the adapter fits that base model.

    Raises InvalidAdapter with all problems at once.
    """
    problems, names = _check_files(folder)
    provenance = _read_provenance(folder, names, problems)
    config = _read_json(folder / CONFIG_FILE, problems) if CONFIG_FILE in names else None
    specs = _read_tensor_header(folder, problems) if TENSOR_FILE in names else None
    golden = _read_golden(folder, problems) if GOLDEN_FILE in names else 0
    if config is not None:
        problems += check_config(
            config,
            is_reward=provenance.task == "reward",
            max_lora_rank=base.max_lora_rank if base else None,
        )
    if specs is not None:
        problems += _check_tensors(specs, config or {}, provenance, base)
        problems += _check_values(folder / TENSOR_FILE, specs)
        problems += _check_digest(folder / TENSOR_FILE, provenance)
    if base is not None:
        problems += _check_base(provenance, base)
    if problems or config is None:
        raise InvalidAdapter(problems)
    config = canonical(config, provenance.base_model)
    modules = config["target_modules"]
    return AdapterFacts(
        provenance=provenance,
        r=config["r"],
        lora_alpha=float(config["lora_alpha"]),
        target_modules=[modules] if isinstance(modules, str) else modules,
        golden_prompts=golden,
        config=config,
        files=sorted(names & {TENSOR_FILE, TEMPLATE_FILE, GOLDEN_FILE}),
    )


def _check_files(folder: Path) -> tuple[list[str], set[str]]:
    if not os.path.isdir(folder):  # unlike Path.is_dir, raises nothing for an impossible name
        raise InvalidAdapter(["folder not found: give the folder that holds adapter_config.json"])
    special, code, strange = [], [], []
    names: set[str] = set()
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if not stat.S_ISREG(entry.lstat().st_mode):
            special.append(shown(name))
        elif name.startswith("adapter_model.") and name != TENSOR_FILE:
            code.append(shown(name))
        elif name not in _ALLOWED:
            strange.append(shown(name))
        else:
            names.add(name)
    problems = [
        *_listed("only regular files are allowed; links, folders or special files: ", special),
        *_listed(
            f"only {TENSOR_FILE} is read; other formats may run code when loaded, convert them with "
            "python -m training convert-adapter: ",
            code,
        ),
        *_listed("unexpected files, remove them: ", strange),
        *(f"{name} is missing" for name in (CONFIG_FILE, TENSOR_FILE) if name not in names),
    ]
    if TEMPLATE_FILE in names:
        problems += _check_template(folder / TEMPLATE_FILE)
    return problems, names


def _check_template(path: Path) -> list[str]:
    if path.stat().st_size > _MAX_TEMPLATE_BYTES:
        return [f"{TEMPLATE_FILE} is larger than {_MAX_TEMPLATE_BYTES >> 10} KiB"]
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return [f"{TEMPLATE_FILE} is not UTF-8 text"]
    return []


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if path.stat().st_size > _MAX_JSON_BYTES:
        problems.append(f"{path.name} is larger than {_MAX_JSON_BYTES >> 20} MiB")
        return None
    try:
        value = strict_json.loads(path.read_bytes())
    except ValueError as error:
        problems.append(f"{path.name} cannot be read as JSON: {str(error)[:200]}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} must be a JSON object")
        return None
    return value


def _read_provenance(folder: Path, names: set[str], problems: list[str]) -> Provenance:
    """Read the trainer's provenance.json or, in a folder from a store, the same facts in its manifest."""
    unknown = Provenance(stage="external")
    file = next((file for file in (PROVENANCE_FILE, MANIFEST_FILE) if file in names), None)
    value = _read_json(folder / file, problems) if file else None
    if value is None:
        return unknown
    try:
        if file == PROVENANCE_FILE:
            return Provenance.model_validate(value)
        manifest = Manifest.model_validate(value)
        return Provenance(**manifest.model_dump(include=set(Provenance.model_fields)))
    except ValidationError as error:
        wrong = [f"{shown('.'.join(map(str, e['loc'])))}: {in_words(e)}" for e in error.errors()]
        problems += _listed(f"{file}: ", wrong)
        return unknown


def _read_tensor_header(folder: Path, problems: list[str]) -> dict[str, TensorSpec] | None:
    try:
        return read_header(folder / TENSOR_FILE)
    except BadTensors as error:
        problems.append(f"{TENSOR_FILE}: {error}")
        return None


def _read_golden(folder: Path, problems: list[str]) -> int:
    try:
        return len(read_golden(folder / GOLDEN_FILE))
    except InvalidAdapter as error:
        problems += error.problems
        return 0


def _check_tensors(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    provenance: Provenance,
    base: BaseModelFacts | None,
) -> list[str]:
    unknown, dtypes, shapes, halves_missing, ranks, strangers = [], [], [], [], [], []
    pairs: dict[str, dict[str, TensorSpec]] = {}
    is_reward = needs_score = provenance.task == "reward"
    for name, spec in specs.items():
        if spec.dtype not in READABLE:
            dtypes.append(f"{shown(name)} is {spec.dtype}")
        if is_reward and name == _SCORE_KEY:
            needs_score = False
            continue
        match = _KEY.fullmatch(name)
        if not match:
            unknown.append(shown(name))
        elif len(spec.shape) != 2 or 0 in spec.shape:
            shapes.append(f"{name} has shape {list(spec.shape)}")
        else:
            pairs.setdefault(match["module"], {})[match["half"]] = spec
    for module, halves in pairs.items():
        if len(halves) < 2:
            halves_missing.append(f"{module} has only lora_{next(iter(halves))}")
            continue
        a, b = halves["A"].shape, halves["B"].shape
        expected = expected_rank(module, config)
        if a[0] != b[1] or (expected is not None and a[0] != expected):
            ranks.append(f"{module} has A {list(a)} and B {list(b)} with r {expected}")
        if base is not None and module not in base.module_shapes:
            strangers.append(module)
        elif base is not None and (a[1], b[0]) != tuple(base.module_shapes[module]):
            into, out = base.module_shapes[module]
            shapes.append(
                f"{module} maps {into} to {out} in {base.name}, but {a[1]} to {b[0]} in the adapter"
            )
    return [
        *_listed("tensors that are not PEFT LoRA weights: ", unknown),
        *_listed("tensors that are not floats (F64, F32, F16 or BF16): ", dtypes),
        *_listed("wrong shapes: ", shapes),
        *_listed("each module needs both lora_A and lora_B: ", halves_missing),
        *_listed("A must be (r, in) and B (out, r), with r from adapter_config.json: ", ranks),
        *_listed(f"{base.name if base else ''} has no LoRA-capable modules with these names: ", strangers),
        *([] if pairs else ["no LoRA pairs: the adapter would change nothing"]),
        *([f"{_SCORE_KEY} is missing: a reward adapter needs its score head"] if needs_score else []),
    ]


def _check_values(path: Path, specs: Mapping[str, TensorSpec]) -> list[str]:
    broken, huge = [], []
    effective: dict[str, set[str]] = {}
    readable = [spec for spec in specs.values() if spec.dtype in READABLE]
    try:
        for spec, peak in read_peaks(path, readable):
            if not math.isfinite(peak):
                broken.append(shown(spec.name))
            elif peak > _MAX_MAGNITUDE:
                huge.append(f"{shown(spec.name)} reaches {peak:.3g}")
            if match := _KEY.fullmatch(spec.name):
                effective.setdefault(match["module"], set()).update(match["half"] if peak != 0 else ())
    except BadTensors as error:
        return [f"{TENSOR_FILE}: {error}"]
    problems = _listed("tensors with NaN or infinity, which would also corrupt other answers: ", broken)
    problems += _listed(f"values beyond ±{_MAX_MAGNITUDE:g}, which trained adapters do not have: ", huge)
    if effective and not any(len(halves) == 2 for halves in effective.values()):
        problems.append(
            "every pair has an all-zero lora_A or lora_B: the adapter would change nothing; was it trained?"
        )
    return problems


def _check_digest(path: Path, provenance: Provenance) -> list[str]:
    """Check the digest, since a proof in half precision cannot tell a small change of the weights from rounding."""
    if provenance.weights_digest in (None, sha256(path)):
        return []
    return [
        f"the SHA-256 of {TENSOR_FILE} is not weights_digest of {PROVENANCE_FILE}: the file was changed or truncated "
        "after training; publish the original, or remove weights_digest if you changed it on purpose"
    ]


def _check_base(provenance: Provenance, base: BaseModelFacts) -> list[str]:
    seen = provenance.base_fingerprint
    if seen is None or seen == base.fingerprint:
        return []
    return [
        f"the adapter was trained on {shown(provenance.base_model)} with fingerprint {shown(seen)}, but this service "
        f"runs {base.name} with fingerprint {base.fingerprint}: serve it on its own base model, or train it on this one"
    ]


def _listed(sentence: str, items: Sequence[str], most: int = 5) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return [sentence + ", ".join(items[:most]) + more]
