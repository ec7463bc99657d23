"""Packed rows: none is cut or lost, and the model treats each as if it were alone."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.training.tiny_models import ARCHITECTURES, tiny_model
from training.tokens.packing import IGNORED, Row, collate, is_exact, pack

PACKABLE = sorted(ARCHITECTURES.keys() - {"bloom"})


def rows(lengths: list[int], vocabulary: int = 90) -> list[Row]:
    chance = random.Random(0)
    made: list[Row] = []
    for length in lengths:
        ids = [chance.randrange(1, vocabulary) for _ in range(length)]
        made.append(
            {"input_ids": ids, "labels": [IGNORED if chance.random() < 0.3 else token for token in ids]}
        )
    return made


def split(packed: Row) -> list[list[int]]:
    ids, found = list(packed["input_ids"]), []
    for length in packed["seq_lengths"]:
        found.append(ids[:length])
        ids = ids[length:]
    assert not ids
    return found


def test_no_row_is_cut_lost_or_overflows() -> None:
    chance = random.Random(1)
    given = rows([chance.randrange(2, 65) for _ in range(200)])
    packed = pack(given, 64)
    assert sorted(ids for each in packed for ids in split(each)) == sorted(row["input_ids"] for row in given)
    assert all(len(each["input_ids"]) == len(each["labels"]) <= 64 for each in packed)
    total = sum(len(row["input_ids"]) for row in given)
    assert len(packed) <= 1.1 * total / 64, "best fit leaves little room"
    assert packed == pack(given, 64)


def test_no_row_is_predicted_from_the_previous_one() -> None:
    (packed,) = pack(rows([5, 4, 3]), 64)
    assert [packed["labels"][at] for at in (0, 5, 9)] == [IGNORED] * 3


def test_padding_has_no_loss() -> None:
    batch = collate(pack(rows([30, 30]), 64) + pack(rows([5]), 64))
    assert batch["input_ids"].shape == (2, 60)
    assert set(batch["labels"][1, 5:].tolist()) == {IGNORED}
    assert set(batch["position_ids"][1, 5:].tolist()) == {0}
    assert batch["position_ids"][0].tolist() == [*range(30), *range(30)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", PACKABLE)
def test_packing_does_not_change_the_loss(architecture: str, attention: str) -> None:
    model = tiny_model(architecture, attention)
    given = rows([9, 5, 12, 7, 3])
    batch = collate(pack(given, 16))
    assert len(batch["input_ids"]) > 1
    with torch.no_grad():
        together = model(**batch, use_cache=False).loss
        alone = [model(**tensors(row)).logits for row in given]
    losses = [
        torch.nn.functional.cross_entropy(
            logits[0, :-1], torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum"
        )
        for logits, row in zip(alone, given, strict=True)
    ]
    learnt = sum(label != IGNORED for row in given for label in row["labels"][1:])
    assert float(together) == pytest.approx(float(sum(losses)) / learnt, rel=1e-5)
    assert is_exact(model)


def tensors(row: Row) -> dict[str, Any]:
    return {"input_ids": torch.tensor([row["input_ids"]])}


def test_an_architecture_without_positions_is_detected() -> None:
    assert not is_exact(tiny_model("bloom"))


def test_an_architecture_with_state_is_detected() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not is_exact(AutoModelForCausalLM.from_config(config))
