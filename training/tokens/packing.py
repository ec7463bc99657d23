"""Packs several rows into one row of full length, without attention between them.

Batches are (rows, max_length), with positions that restart in each packed row; the attention mask follows from them.
One long row for the whole batch, as variable-length kernels want it, would cost other kernels the square of the batch
size.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -100  # the label without loss in transformers
_PROBE = 8  # tokens per row in the test of is_exact
_TOLERANCE = {torch.float32: 1e-3}
_COARSE = 0.1

Row = dict[str, Any]
"""`input_ids` and `labels`; packed rows also have `seq_lengths`, the lengths of the rows in them."""


def pack(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Pack rows by best fit, longest first; no row is cut.

    The first label of each row is dropped, since it would be predicted from the previous row.
    """
    bins: list[list[Row]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin number), sorted
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        tightest = bisect_left(rooms, (length, 0))
        if tightest == len(rooms):
            room, number = max_length, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(tightest)
        bins[number].append(row)
        insort(rooms, (room - length, number))
    return [
        {
            "input_ids": [token for row in packed for token in row["input_ids"]],
            "labels": [label for row in packed for label in (IGNORED, *row["labels"][1:])],
            "seq_lengths": [len(row["input_ids"]) for row in packed],
        }
        for packed in bins
    ]


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Collate rows, packed or not, into a batch. Padding attends only to itself and has no loss."""
    length = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for at, row in enumerate(rows):
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        filled = slice(len(row["input_ids"]))
        batch["input_ids"][at, filled] = torch.tensor(row["input_ids"])
        batch["labels"][at, filled] = torch.tensor(row["labels"])
        batch["position_ids"][at, filled] = torch.cat([torch.arange(length) for length in lengths])
    return batch


@torch.no_grad()
def is_exact(model: Any) -> bool:
    """Whether this architecture keeps packed rows apart: each gets the same logits as alone.

    This is tested on the model, since some architectures ignore positions or carry state from one row into the next.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = (torch.arange(3 * _PROBE) * 7919 % vocabulary).tolist()
    one, other, row = (tokens[at : at + _PROBE] for at in range(0, 3 * _PROBE, _PROBE))
    was_training = model.training
    model.eval()
    alone = _logits(model, [row])
    after_one, after_other = _logits(model, [one, row]), _logits(model, [other, row])
    model.train(was_training)
    allowed = _TOLERANCE.get(alone.dtype, _COARSE) * float(alone.std())
    return torch.equal(after_one, after_other) and float((alone - after_one).abs().max()) <= allowed


def _logits(model: Any, rows: Sequence[list[int]]) -> torch.Tensor:
    """Return the logits of the last row, packed after the others."""
    packed = {
        "input_ids": [token for row in rows for token in row],
        "labels": [IGNORED] * sum(map(len, rows)),
        "seq_lengths": [len(row) for row in rows],
    }
    batch = collate([packed])
    found: torch.Tensor = model(
        input_ids=batch["input_ids"].to(model.device),
        position_ids=batch["position_ids"].to(model.device),
        use_cache=False,
    ).logits
    return found[0, -len(rows[-1]) :]
