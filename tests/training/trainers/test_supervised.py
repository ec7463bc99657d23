"""Rows of similar length share a batch, batches come in random order, in both stages that use the trainer."""

import random
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.training.jobs import SFT, load_job, run_job
from training.trainers import cpu_head as head
from training.trainers.supervised import AlikeBatches


def lengths(count: int) -> list[int]:
    chance = random.Random(0)
    return [chance.randrange(10, 500) for _ in range(count)]


def batches(count: int, size: int, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    rows = list(AlikeBatches(lengths(count), size, seed, lambda: epoch))
    return [rows[at : at + size] for at in range(0, count, size)]


@pytest.mark.parametrize("count", [1, 7, 8, 203, 1000])
def test_each_row_occurs_once_per_epoch(count: int) -> None:
    assert sorted(row for batch in batches(count, 8) for row in batch) == list(range(count))


def test_batches_have_little_padding() -> None:
    size = lengths(1003)
    tokens = sum(size)
    padded = sum(len(batch) * max(size[row] for row in batch) for batch in batches(1003, 8))
    assert tokens / padded > 0.95
    assert all(len(batch) == 8 for batch in batches(1003, 8)[:-1])


def test_batches_are_not_in_order_of_length() -> None:
    size = lengths(1000)
    longest = [max(size[row] for row in batch) for batch in batches(1000, 8)]
    half = len(longest) // 2
    assert abs(sum(longest[:half]) / half - sum(longest[half:]) / (len(longest) - half)) < 60
    rises = sum(one < other for one, other in pairwise(longest))
    assert 0.35 < rises / len(longest) < 0.65


def test_the_order_depends_on_seed_and_epoch() -> None:
    assert batches(100, 8) == batches(100, 8)
    assert batches(100, 8) != batches(100, 8, epoch=1) != batches(100, 8, seed=1)


def test_the_epoch_is_read_when_iteration_starts() -> None:
    epoch = [0]
    rows = AlikeBatches(lengths(100), 8, 0, lambda: epoch[0])
    first = list(rows)
    epoch[0] = 1
    assert list(rows) != first
    epoch[0] = 0
    assert list(rows) == first


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_stages_use_this_order_and_the_cpu_head(stage: str, tiny_dir: Path) -> None:
    with (
        patch.object(AlikeBatches, "__iter__", autospec=True, side_effect=AlikeBatches.__iter__) as order,
        patch.object(head, "score", side_effect=head.score) as score,
    ):
        run_job(load_job(tiny_dir, SFT, stage=stage, max_steps=2, evaluation_files=[]), tiny_dir)
    assert order.call_count == 1
    assert score.call_count == 2
