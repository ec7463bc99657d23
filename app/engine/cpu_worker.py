"""The worker extension on CPU: repairs multi-LoRA, which in vLLM 0.32 is wrong there, and slow.

Stock PunicaWrapperCPU marks rows without an adapter by index -1 and then indexes the stacked weights with
it, so that a base-model row in a mixed batch gets the adapter of the *last* slot. It also copies A and B
once for every token. Here each adapter's rows are found once a step and get one product per module; rows that
lie side by side, as a prompt's do, are changed where they are. Rows without an adapter are left alone.

Stock also applies adapters of the embedding and of the output head in every step, though none is ever loaded
(validation admits linear layers only), and a request with prompt_logprobs in a mixed batch ends the engine there:
the rows of the prompt outnumber the indices of the samples. Here those steps are left out.

Drop this when vLLM releases the repair (vllm-project/vllm, pull requests 48421 and 49656).
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from app.engine.worker import WorkerExtension

_update_metadata = PunicaWrapperCPU.update_metadata


def _group_rows(wrapper: Any, *arguments: Any, **keywords: Any) -> None:
    _update_metadata(wrapper, *arguments, **keywords)
    slots = wrapper.token_lora_indices
    wrapper.rows_of_slot = [(slot, _rows(slots == slot)) for slot in slots.unique().tolist() if slot >= 0]


def _rows(chosen: torch.Tensor) -> torch.Tensor | slice:
    """The places of what is True: a slice if they are side by side."""
    rows = chosen.nonzero().flatten()
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first < len(rows) else rows


def _add_lora_linear(
    wrapper: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """y[rows, slice] += scale · x[rows] · Aᵀ · Bᵀ for each adapter's rows and each part of a packed module.

    x: (tokens, in); y: (tokens, sum of output_slices), changed in place; A: (slots, 1, r, in);
    B: (slots, 1, out, r).
    """
    y = y.view(-1, y.shape[-1])
    x = x.view(-1, x.shape[-1])
    for slot, rows in wrapper.rows_of_slot:
        weights = [
            (a[slot, 0].t(), b[slot, 0].t()) for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True)
        ]
        if isinstance(rows, slice):
            inputs, outputs = x[rows], y[rows].split(output_slices, dim=1)
            for output, (a, b) in zip(outputs, weights, strict=True):
                output.addmm_(inputs @ a, b, alpha=scale)
        else:
            inputs = x.index_select(0, rows)
            deltas = torch.cat([inputs @ a @ b for a, b in weights], dim=1)
            y.index_add_(0, rows, deltas, alpha=scale)


def _add_nothing(wrapper: Any, *_: Any, **__: Any) -> None:
    """What embedding and output head give is right as it is."""


PunicaWrapperCPU.rows_of_slot = []  # until the first step with adapters
PunicaWrapperCPU.update_metadata = _group_rows
PunicaWrapperCPU.add_lora_linear = _add_lora_linear
PunicaWrapperCPU.add_lora_embedding = _add_nothing
PunicaWrapperCPU.add_lora_logits = _add_nothing

__all__ = ["WorkerExtension"]
