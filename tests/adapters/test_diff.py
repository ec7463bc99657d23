"""adapters/diff.py, compared with dense products."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import InvalidAdapter
from adapters.diff import ModuleDiff, RevisionDiff, diff, expected_alpha, render
from tests.adapters.folders import DOWN, GOLDEN, SCORE, Folder, Q, key, make_folder, pair


def dense(folder: Folder, module: str) -> np.ndarray:
    """Return a folder's update to a module's weights, scaled as PEFT scales it."""
    a, b = (folder.tensors[key(module, half)] for half in "AB")
    if a.dtype == np.uint16:
        a, b = ((half.astype(np.uint32) << 16).view(np.float32) for half in (a, b))
    alpha = folder.config["lora_alpha"]
    for name, value in folder.config.get("alpha_pattern", {}).items():
        if module == name or module.endswith("." + name):
            alpha = value
            break
    r = a.shape[0]
    scale = alpha / math.sqrt(r) if folder.config.get("use_rslora") else alpha / r
    return scale * (b.astype(np.float64) @ a.astype(np.float64))


def two(tmp_path: Path) -> tuple[Folder, Folder]:
    return make_folder(tmp_path / "old", 1), make_folder(tmp_path / "new", 2)


def check(old: Folder, new: Folder) -> RevisionDiff:
    """Run diff and check every number against dense products."""
    found = diff(old.write(), new.write())
    for module in found.modules:
        before = dense(old, module.module) if module.in_old else None
        after = dense(new, module.module) if module.in_new else None
        shape = (after if before is None else before).shape
        before, after = (np.zeros(shape) if matrix is None else matrix for matrix in (before, after))
        assert module.old_norm == pytest.approx(np.linalg.norm(before), rel=1e-12)
        assert module.new_norm == pytest.approx(np.linalg.norm(after), rel=1e-12)
        assert module.moved == pytest.approx(np.linalg.norm(after - before), rel=1e-6)
        if module.old_norm:
            assert module.relative == pytest.approx(module.moved / module.old_norm)
        if module.cosine is not None:
            cosine = np.sum(before * after) / np.linalg.norm(before) / np.linalg.norm(after)
            assert module.cosine == pytest.approx(cosine, abs=1e-9)
    for total in ("old_norm", "new_norm", "moved"):
        assert getattr(found, total) == pytest.approx(
            math.sqrt(sum(getattr(module, total) ** 2 for module in found.modules))
        )
    moves = [module.moved for module in found.modules]
    assert moves == sorted(moves, reverse=True)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_random_pairs_of_any_shape_rank_and_type(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    folders = two(tmp_path)
    into, out = random.integers(1, 40, 2)
    for number, folder in enumerate(folders):
        r = int(random.integers(1, 12))
        folder.tensors = pair(Q, r, into, out, seed * 2 + number)
        folder.config |= {"r": r, "lora_alpha": float(random.uniform(0.1, 64)), "use_rslora": bool(r % 2)}
        dtype = random.choice(["float16", "float32", "float64", "bf16"])
        folder.tensors = {
            name: (array.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else array.astype(dtype)
            for name, array in folder.tensors.items()
        }
    [module] = check(*folders).modules
    assert module.moved > 0


def test_a_small_step_is_measured(tmp_path: Path) -> None:
    old, new = two(tmp_path)
    old.tensors = {name: array.astype(np.float64) for name, array in old.tensors.items()}
    random = np.random.default_rng(0)
    new.tensors = {
        name: array * (1 + 1e-4 * random.normal(size=array.shape)) for name, array in old.tensors.items()
    }
    for module in check(old, new).modules:
        assert 1e-5 < module.relative < 1e-3


def test_equal_revisions_have_moved_by_exactly_0(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "old", 1)
    new = make_folder(tmp_path / "new", 1)
    found = diff(old.write(), new.write())
    assert [(module.moved, module.cosine) for module in found.modules] == [(0.0, 1.0)] * 2
    assert (found.moved, found.config, found.golden_differs, found.template_differs) == (
        0.0,
        {},
        False,
        False,
    )


@pytest.mark.parametrize("seed", range(10))
def test_the_same_product_of_other_factors_has_not_moved(tmp_path: Path, seed: int) -> None:
    """B Q and Qᵀ A have the same product as B and A, except for rounding."""
    old, new = two(tmp_path)
    random = np.random.default_rng(seed)
    old.tensors = {name: array.astype(np.float64) for name, array in pair(Q, 8, 300, 200, seed).items()}
    turn = np.linalg.qr(random.normal(size=(8, 8)))[0]
    new.tensors = {
        key(Q, "A"): turn.T @ old.tensors[key(Q, "A")],
        key(Q, "B"): old.tensors[key(Q, "B")] @ turn,
    }
    [module] = diff(old.write(), new.write()).modules
    assert (module.moved, module.relative, module.cosine) == (0.0, 0.0, 1.0)


def test_the_opposite_product(tmp_path: Path) -> None:
    old, new = two(tmp_path)
    new.tensors = {name: -array if "lora_B" in name else array for name, array in old.tensors.items()}
    for module in check(old, new).modules:
        assert (module.cosine, module.relative) == (pytest.approx(-1), pytest.approx(2))


def test_modules_of_one_revision_only(tmp_path: Path) -> None:
    old, new = two(tmp_path)
    old.tensors = pair(Q, 4, 8, 8, 1)
    new.tensors = pair(DOWN, 4, 16, 8, 2)
    modules = {module.module: module for module in check(old, new).modules}
    gone, come = modules[Q], modules[DOWN]
    assert (gone.in_old, gone.in_new, gone.new_norm, gone.relative, gone.cosine) == (
        True,
        False,
        0.0,
        1.0,
        None,
    )
    assert (come.in_old, come.in_new, come.old_norm, come.relative, come.cosine) == (
        False,
        True,
        0.0,
        None,
        None,
    )
    assert (gone.moved, come.moved) == (gone.old_norm, come.new_norm)


def test_a_product_of_zeros_has_no_angle(tmp_path: Path) -> None:
    old, new = two(tmp_path)
    old.tensors[key(Q, "B")] = np.zeros((8, 4), np.float32)
    module = next(module for module in check(old, new).modules if module.module == Q)
    assert (module.in_old, module.old_norm, module.relative, module.cosine) == (True, 0.0, None, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 16},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"self_attn.q_proj": 3, "q_proj": 5}},
        {"alpha_pattern": {"proj": 3}},
        {"alpha_pattern": {Q: 0.5}, "use_rslora": True},
    ],
)
def test_the_scale_alone_moves_modules(tmp_path: Path, changes: dict[str, Any]) -> None:
    old, new = make_folder(tmp_path / "old", 1), make_folder(tmp_path / "new", 1)
    new.config |= changes
    found = check(old, new)
    assert found.config == {name: (old.config.get(name), value) for name, value in changes.items()}
    assert (found.moved > 0) == (changes != {"alpha_pattern": {"proj": 3}})


def test_a_rank_of_its_own_for_one_module(tmp_path: Path) -> None:
    old, new = two(tmp_path)
    new.tensors |= pair(Q, 2, 8, 8, 5)
    new.config["rank_pattern"] = {"q_proj": 2}
    assert check(old, new).config == {"rank_pattern": (None, {"q_proj": 2})}


def test_alpha_follows_the_rule_of_peft() -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {"q_proj": 3, "self_attn.q_proj": 5, "down_proj": 0.5}}
    assert [expected_alpha(module, config) for module in (Q, DOWN, "x.q_projs", "xq_proj")] == [3, 0.5, 8, 8]
    assert expected_alpha(Q, {"lora_alpha": 8, "alpha_pattern": None}) == 8


def test_other_files_differ_by_their_bytes(tmp_path: Path) -> None:
    old, new = make_folder(tmp_path / "old"), make_folder(tmp_path / "new")
    new.golden = [GOLDEN]
    new.others["chat_template.jinja"] = b"{{ messages }}"
    found = diff(old.write(), new.write())
    assert (found.golden_differs, found.template_differs) == (True, True)
    old.golden, old.others["chat_template.jinja"] = new.golden, b"{{ messages }} "
    found = diff(old.write(), new.write())
    assert (found.golden_differs, found.template_differs) == (False, True)


def test_a_score_head_is_not_a_pair(tmp_path: Path, reward: Folder) -> None:
    other = make_folder(tmp_path / "other", 3)
    other.tensors[SCORE] = np.zeros((1, 8), np.float32)
    assert {module.module for module in check(reward, other).modules} == {Q, DOWN}


def spoiled(folder: Folder, name: str, content: bytes) -> None:
    folder.others[name] = content


BROKEN = {
    "config no JSON": (lambda f: spoiled(f, "adapter_config.json", b"{"), "cannot be read as JSON"),
    "config a list": (lambda f: spoiled(f, "adapter_config.json", b"[]"), "must be a JSON object"),
    "tensors truncated": (
        lambda f: spoiled(f, "adapter_model.safetensors", b"abc"),
        "safetensors: the file is truncated",
    ),
    "no alpha": (lambda f: f.config.pop("lora_alpha"), "lora_alpha of .* is None"),
    "half a pair": (lambda f: f.tensors.pop(key(Q, "A")), "without a matching A .*q_proj"),
    "ranks that disagree": (
        lambda f: f.tensors.update({key(Q, "A"): np.ones((3, 8))}),
        "without a matching A .*q_proj",
    ),
    "whole numbers": (
        lambda f: f.tensors.update({key(Q, "A"): np.ones((4, 8), np.int8)}),
        "without a matching A .*q_proj",
    ),
    "another base model": (
        lambda f: f.tensors.update(pair(Q, 4, 9, 8)),
        "maps 8 to 8 in the old .* 9 to 8 in the new",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_revisions_that_cannot_be_compared_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    old, new = two(tmp_path)
    change(new)
    with pytest.raises(InvalidAdapter, match=message):
        diff(old.write(), new.write())


def test_it_is_plain_json(tmp_path: Path) -> None:
    old, new = two(tmp_path)
    new.config["lora_alpha"] = 16
    found = diff(old.write(), new.write())
    assert json.loads(found.model_dump_json())["config"] == {"lora_alpha": [8, 16]}
    assert RevisionDiff.model_validate_json(found.model_dump_json()) == found


def test_the_table(tmp_path: Path) -> None:
    old, new = two(tmp_path)
    old.tensors = pair(Q, 4, 8, 8, 1)
    new.golden = [GOLDEN]
    new.config["lora_alpha"] = 16
    lines = render(diff(old.write(), new.write())).splitlines()
    assert lines[0].split() == ["module", "old", "new", "moved", "relative", "cosine"]
    assert {line.split()[0] for line in lines[1:3]} == {Q, DOWN}
    assert next(line for line in lines if line.startswith(DOWN)).split()[1] == "none"
    assert lines[3].startswith("all ")
    assert lines[4:] == ["lora_alpha: 8 -> 16", "the golden prompts differ"]


def test_a_long_table_is_shortened(tmp_path: Path) -> None:
    row = ModuleDiff(
        module="m" * 200, old_norm=1, new_norm=1, moved=1, relative=1, cosine=0.5, in_old=True, in_new=True
    )
    found = RevisionDiff(
        modules=[row] * 23,
        old_norm=1,
        new_norm=1,
        moved=1,
        config={},
        golden_differs=False,
        template_differs=True,
    )
    lines = render(found).splitlines()
    assert [lines[21], lines[23]] == ["and 3 more", "the chat template differs"]
    assert len({len(line) for line in lines[:21]}) == 1
    assert len(lines[1]) <= 110


def test_products_are_never_formed(tmp_path: Path) -> None:
    """They would take 20 GB here."""
    old, new = two(tmp_path)
    for folder, seed in ((old, 1), (new, 2)):
        folder.tensors = pair(Q, 2, 50_000, 50_000, seed)
        folder.config["r"] = 2
    [module] = diff(old.write(), new.write()).modules
    assert module.moved == pytest.approx(math.hypot(module.old_norm, module.new_norm), rel=0.01)
