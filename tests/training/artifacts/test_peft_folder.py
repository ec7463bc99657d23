import argparse
import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import InvalidAdapter
from tests.training.old_adapters import PREFIX, Evil, Tensors, old_folder
from training.artifacts.peft_folder import new_folder, read_adapter, read_template
from training.errors import Busy, ConfigError


@pytest.fixture
def tensors() -> Tensors:
    """LoRA pairs of two layers."""
    return {
        f"{PREFIX}model.layers.{layer}.self_attn.{target}.lora_{half}.weight": torch.randn(shape)
        for layer in (0, 1)
        for target in ("q_proj", "v_proj")
        for half, shape in (("A", (4, 16)), ("B", (16, 4)))
    }


def problems_of(folder: Path, drop: Collection[str] = ()) -> str:
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter(folder, drop)
    return str(caught.value)


# Fused layers of PEFT 0.2


class MergedLinear(torch.nn.Module):
    """PEFT 0.2's computation for `enable_lora`: a grouped convolution, with zeros for parts that are not enabled."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, enabled: list[bool], out: int) -> None:
        super().__init__()
        self.a, self.b, self.enabled, self.out = a, b, enabled, out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        after_a = torch.nn.functional.linear(x, self.a)
        after_b = torch.nn.functional.conv1d(after_a.transpose(-2, -1), self.b, groups=sum(self.enabled))
        rows = torch.zeros(self.out, dtype=torch.bool).view(len(self.enabled), -1)
        rows[torch.tensor(self.enabled)] = True
        result = x.new_zeros((*x.shape[:-1], self.out))
        result[..., rows.view(-1)] = after_b.transpose(-2, -1)
        return result


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, False]])
def test_parts_of_a_fused_layer_become_one_pair(enabled: list[bool], tmp_path: Path) -> None:
    r, into, out, parts = 4, 32, 96, sum(enabled)
    a, b = torch.randn(r * parts, into), torch.randn(out // 3 * parts, r, 1)
    name = PREFIX + "transformer.layers.0.attention.query_key_value.lora_"
    source = old_folder(
        tmp_path / "old",
        {f"{name}A.weight": a, f"{name}B.weight": b},
        enable_lora=enabled,
        target_modules=["query_key_value"],
    )
    adapter = read_adapter(source)
    joint_a, joint_b = (adapter.lora[f"{name.removeprefix(PREFIX)}{half}.weight"] for half in "AB")
    x = torch.randn(2, 5, into)
    torch.testing.assert_close(x @ joint_a.T @ joint_b.T, MergedLinear(a, b, enabled, out)(x))
    assert adapter.config["r"] == joint_a.shape[0] == joint_b.shape[1] == 4 * parts
    assert adapter.config["lora_alpha"] / adapter.config["r"] == 8 / 4
    assert "enable_lora" not in adapter.config


def test_parts_of_unknown_shape_are_refused(tmp_path: Path) -> None:
    name = PREFIX + "h.0.attn.c_attn.lora_"
    source = old_folder(
        tmp_path / "old",
        {f"{name}A.weight": torch.ones(4, 32), f"{name}B.weight": torch.ones(64, 4, 1)},
        enable_lora=[True, False, True],
        target_modules=["c_attn"],
    )
    assert "so their parts are unknown" in problems_of(source)


# Refused


@pytest.mark.parametrize("form", ["torch", "bare"])
def test_code_in_a_pickle_is_refused_and_not_run(form: str, tensors: Tensors, tmp_path: Path) -> None:
    mark = tmp_path / "old" / "ran"
    source = old_folder(tmp_path / "old", {**tensors, "x": Evil(mark)})
    if form == "bare":
        (source / "adapter_model.bin").write_bytes(pickle.dumps({"x": Evil(mark)}))
    message = problems_of(source)
    assert not mark.exists()
    assert ("would run as code" if form == "torch" else "not written by torch.save") in message
    assert "weights_only" not in message


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "contains no tensors"),
        ([torch.ones(2)], "not a dictionary of tensors"),
        ({"x": argparse.Namespace(a=1)}, "argparse.Namespace"),
        ({"epoch": 3}, "not plain tensors: 'epoch'"),
        ({"x": torch.ones(1).expand(1 << 20)}, "not plain tensors: 'x'"),
        ({"x": torch.ones(2).to_sparse()}, "not plain tensors: 'x'"),
        ({"x": torch.ones(2, device="meta")}, "not plain tensors: 'x'"),
        ({"rotary_emb.inv_freq": torch.ones(2)}, "it contains no LoRA pair"),
    ],
    ids=["empty", "list", "object", "number", "stretched", "sparse", "meta", "buffer only"],
)
def test_useless_files_are_refused(saved: object, message: str, tmp_path: Path) -> None:
    assert message in problems_of(old_folder(tmp_path / "old", saved))


def test_damaged_files_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", tensors)
    file = source / "adapter_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-400])
    assert "damaged" in problems_of(source)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    assert "compressed" in problems_of(source)
    file.unlink()
    assert "neither" in problems_of(source)
    (source / "adapter_config.json").write_text('{"r": NaN}')
    assert "cannot be read as JSON" in problems_of(source)


def test_an_incomplete_pair_is_named(tensors: Tensors, tmp_path: Path) -> None:
    del tensors[PREFIX + "model.layers.1.self_attn.q_proj.lora_B.weight"]
    message = problems_of(old_folder(tmp_path / "old", tensors))
    assert "model.layers.1.self_attn.q_proj has only lora_A" in message


def test_unknown_settings_are_refused_by_name(tensors: Tensors, tmp_path: Path) -> None:
    source = old_folder(tmp_path / "old", tensors, some_new_option_2027=True)
    assert "'some_new_option_2027' is True" in problems_of(source)
    assert "names no setting or tensor" in problems_of(source, drop=["some_old_option"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"peft_type": "IA3"}, "only LORA"), ({"task_type": "SEQ_2_SEQ_LM"}, "only CAUSAL_LM")],
)
def test_other_kinds_of_adapters_are_refused(
    changes: dict[str, Any], message: str, tensors: Tensors, tmp_path: Path
) -> None:
    assert message in problems_of(old_folder(tmp_path / "old", tensors, **changes))


def test_several_adapters_in_one_file_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    both = {
        key.replace(".weight", f".{name}.weight"): value for key, value in tensors.items() for name in "ab"
    }
    assert "other names of the same tensor" in problems_of(old_folder(tmp_path / "old", both))
    layers = {
        key.replace(".weight", f".{'a' if '.0.' in key else 'b'}.weight"): value
        for key, value in tensors.items()
    }
    assert "several adapters" in problems_of(old_folder(tmp_path / "older", layers))


def test_a_template_that_is_not_text_is_refused(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidAdapter, match="not UTF-8"):
        read_template(tmp_path)


# New folders


def fail_half_way(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "half").write_text("half")
        raise ZeroDivisionError


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "models" / "new"
    with pytest.raises(ZeroDivisionError):
        fail_half_way(target)
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").write_text("whole")
        assert not target.exists()
        with pytest.raises(Busy, match="by another process"), new_folder(target):
            pytest.fail("two wrote at once")
    assert [path.name for path in target.parent.iterdir()] == ["new"]
    assert (target / "whole").read_text() == "whole"
    with pytest.raises(ConfigError, match="is not overwritten"), new_folder(target):
        pytest.fail("it was overwritten")
