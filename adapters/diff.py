"""Compare two revisions from their files: which modules moved, and by how much."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from adapters import strict_json
from adapters.errors import InvalidAdapter, shown
from adapters.golden import GOLDEN_FILE
from adapters.tensors import READABLE, BadTensors, TensorSpec, read_header
from adapters.validate import CONFIG_FILE, TEMPLATE_FILE, TENSOR_FILE

# A sum of squares that cancels to less than this share of its terms is rounding: a norm of 1e-7 of its parts.
_ROUNDING = 1e-14
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_ROWS_SHOWN = 20
_NAME_WIDTH = 48

_Matrix = npt.NDArray[np.float64]
_Pair = tuple[TensorSpec, TensorSpec]


class ModuleDiff(BaseModel):
    """One module. Norms are Frobenius norms of the update to its weights, including the scale."""

    model_config = ConfigDict(frozen=True)

    module: str
    old_norm: float = Field(description="0 if the old revision does not change the module")
    new_norm: float
    moved: float = Field(description="Norm of the difference")
    relative: float | None = Field(description="`moved` / `old_norm`; None if `old_norm` is 0")
    cosine: float | None = Field(description="Cosine of the angle between old and new; None if either is 0")
    in_old: bool
    in_new: bool


class RevisionDiff(BaseModel):
    """The difference between two revisions. Norms are over all modules."""

    model_config = ConfigDict(frozen=True)

    modules: list[ModuleDiff] = Field(description="Modules, the one that moved most first")
    old_norm: float
    new_norm: float
    moved: float
    config: dict[str, tuple[Any, Any]] = Field(
        description="Settings that differ, as (old, new); None: not set"
    )
    golden_differs: bool
    template_differs: bool


def diff(old: Path, new: Path) -> RevisionDiff:
    """Compare the folders of two validated revisions. Only one module's tensors are in memory at a time.

    The (out, in) products are never formed: ‖BA‖² is the sum of (BᵀB) * (AAᵀ), which are (r, r). Cancellation in this
    sum costs half the digits of float64: `moved` is accurate to about 1e-8 of the norms, and a difference below 1e-7 of
    the norms, which rounding alone can cause, is set to 0. Equal tensors give exactly 0. Raises InvalidAdapter if a
    folder cannot be read or compared, OSError.
    """
    configs = _config(old), _config(new)
    pairs = _pairs(old), _pairs(new)
    names = sorted(pairs[0].keys() | pairs[1].keys())
    _check_shapes(pairs[0], pairs[1])
    modules = []
    for module in names:
        before, after = (
            _factors(folder, found[module], _scale(module, config, found[module]))
            if module in found
            else None
            for folder, found, config in zip((old, new), pairs, configs, strict=True)
        )
        modules.append(_compare(module, before, after))
    return RevisionDiff(
        modules=sorted(modules, key=lambda module: -module.moved),
        old_norm=math.hypot(*(module.old_norm for module in modules)),
        new_norm=math.hypot(*(module.new_norm for module in modules)),
        moved=math.hypot(*(module.moved for module in modules)),
        config={
            key: (configs[0].get(key), configs[1].get(key))
            for key in sorted(configs[0].keys() | configs[1].keys())
            if configs[0].get(key) != configs[1].get(key)
        },
        golden_differs=_content(old / GOLDEN_FILE) != _content(new / GOLDEN_FILE),
        template_differs=_content(old / TEMPLATE_FILE) != _content(new / TEMPLATE_FILE),
    )


def render(diff: RevisionDiff) -> str:
    """Return a table for the terminal: the modules that moved most, then all other differences."""
    lines = [
        f"{'module':{_NAME_WIDTH}}  {'old':>10}  {'new':>10}  {'moved':>10}  {'relative':>9}  {'cosine':>8}"
    ]
    for module in diff.modules[:_ROWS_SHOWN]:
        name = module.module if len(module.module) <= _NAME_WIDTH else "…" + module.module[1 - _NAME_WIDTH :]
        old = f"{module.old_norm:.4g}" if module.in_old else "none"
        new = f"{module.new_norm:.4g}" if module.in_new else "none"
        relative = "-" if module.relative is None else f"{module.relative:.2%}"
        cosine = "-" if module.cosine is None else f"{module.cosine:.5f}"
        lines.append(
            f"{name:{_NAME_WIDTH}}  {old:>10}  {new:>10}  {module.moved:>10.4g}  {relative:>9}  {cosine:>8}"
        )
    if len(diff.modules) > _ROWS_SHOWN:
        lines.append(f"and {len(diff.modules) - _ROWS_SHOWN} more")
    lines.append(
        f"{'all':{_NAME_WIDTH}}  {diff.old_norm:>10.4g}  {diff.new_norm:>10.4g}  {diff.moved:>10.4g}"
    )
    lines += [f"{key}: {shown(old)} -> {shown(new)}" for key, (old, new) in diff.config.items()]
    if diff.golden_differs:
        lines.append("the golden prompts differ")
    if diff.template_differs:
        lines.append("the chat template differs")
    return "\n".join(lines)


def expected_alpha(module: str, config: Mapping[str, Any]) -> float:
    """Return the alpha PEFT gives `module`: of the first key of alpha_pattern that is a dotted suffix, or lora_alpha.

    Raises InvalidAdapter.
    """
    pattern = config.get("alpha_pattern")
    found = config.get("lora_alpha")
    for name, alpha in pattern.items() if isinstance(pattern, dict) else ():
        if f".{module}".endswith(f".{name}"):
            found = alpha
            break
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise InvalidAdapter([f"{CONFIG_FILE}: lora_alpha of {module} is {shown(found)}: must be a number"])
    return float(found)


def _scale(module: str, config: Mapping[str, Any], pair: _Pair) -> float:
    r = pair[0].shape[0]
    return expected_alpha(module, config) / (math.sqrt(r) if config.get("use_rslora") else r)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = strict_json.loads((folder / CONFIG_FILE).read_bytes())
    except ValueError as error:
        raise InvalidAdapter([f"{CONFIG_FILE} cannot be read as JSON: {str(error)[:200]}"]) from error
    if not isinstance(config, dict):
        raise InvalidAdapter([f"{CONFIG_FILE} must be a JSON object"])
    return config


def _pairs(folder: Path) -> dict[str, _Pair]:
    """Return A and B of each module."""
    halves: dict[str, dict[str, TensorSpec]] = {}
    try:
        specs = read_header(folder / TENSOR_FILE)
    except BadTensors as error:
        raise InvalidAdapter([f"{TENSOR_FILE}: {error}"]) from error
    for name, spec in specs.items():
        if match := _KEY.fullmatch(name):
            halves.setdefault(match[1], {})[match[2]] = spec
    broken = [shown(module) for module, found in halves.items() if not _is_pair(found)]
    if broken:
        raise InvalidAdapter(
            [f"{TENSOR_FILE}: modules without a matching A (r, in) and B (out, r): {', '.join(broken[:5])}"]
        )
    return {module: (found["A"], found["B"]) for module, found in halves.items()}


def _is_pair(halves: Mapping[str, TensorSpec]) -> bool:
    shapes = [halves[half].shape for half in ("A", "B") if half in halves]
    is_readable = all(spec.dtype in READABLE for spec in halves.values())
    return is_readable and [len(shape) for shape in shapes] == [2, 2] and shapes[0][0] == shapes[1][1] > 0


def _check_shapes(old: Mapping[str, _Pair], new: Mapping[str, _Pair]) -> None:
    """Raises InvalidAdapter if the products of a module have different shapes."""
    sizes = {
        module: [(a.shape[1], b.shape[0]) for a, b in (old[module], new[module])]
        for module in sorted(old.keys() & new.keys())
    }
    problems = [
        f"{shown(module)} maps {before[0]} to {before[1]} in the old revision, but {after[0]} to {after[1]} in the "
        "new one: compare revisions for the same base model"
        for module, (before, after) in sizes.items()
        if before != after
    ]
    if problems:
        raise InvalidAdapter(problems)


def _factors(folder: Path, pair: _Pair, scale: float) -> tuple[_Matrix, _Matrix]:
    """Return A, and B times the scale."""
    with (folder / TENSOR_FILE).open("rb") as file:
        matrices = []
        for spec in pair:
            file.seek(spec.begin)
            content = file.read(spec.end - spec.begin)
            if len(content) != spec.end - spec.begin:
                raise InvalidAdapter([f"{TENSOR_FILE} was truncated while it was read"])
            values = np.frombuffer(content, READABLE[spec.dtype]).reshape(spec.shape)
            if spec.dtype == "BF16":  # the upper half of a float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            matrices.append(values.astype(np.float64))
    return matrices[0], matrices[1] * scale


def _compare(
    module: str, old: tuple[_Matrix, _Matrix] | None, new: tuple[_Matrix, _Matrix] | None
) -> ModuleDiff:
    old_square, new_square = (_inner(pair, pair) if pair else 0.0 for pair in (old, new))
    old_norm, new_norm = math.sqrt(max(old_square, 0.0)), math.sqrt(max(new_square, 0.0))
    moved, cosine = max(old_norm, new_norm), None
    if old and new:
        moved = 0.0 if all(map(np.array_equal, old, new)) else _distance(old, new)
        if old_norm and new_norm:
            cosine = 1.0 if moved == 0 else min(max(_inner(old, new) / (old_norm * new_norm), -1.0), 1.0)
    return ModuleDiff(
        module=module,
        old_norm=old_norm,
        new_norm=new_norm,
        moved=moved,
        relative=moved / old_norm if old_norm else None,
        cosine=cosine,
        in_old=old is not None,
        in_new=new is not None,
    )


def _inner(left: tuple[_Matrix, _Matrix], right: tuple[_Matrix, _Matrix]) -> float:
    """Return the Frobenius inner product of two products B A."""
    return float(np.sum((left[1].T @ right[1]) * (left[0] @ right[0].T)))


def _distance(old: tuple[_Matrix, _Matrix], new: tuple[_Matrix, _Matrix]) -> float:
    """Return the norm of new B A minus old B A, computed as one product of stacked factors."""
    a, b = np.concatenate([new[0], old[0]]), np.concatenate([new[1], -old[1]], axis=1)
    terms = (b.T @ b) * (a @ a.T)
    square = float(np.sum(terms))
    return math.sqrt(square) if square > _ROUNDING * float(np.sum(np.abs(terms))) else 0.0


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
