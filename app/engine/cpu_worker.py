"""The worker extension on CPU: repairs multi-LoRA, which in vLLM 0.32 is wrong there, and slow.

Stock PunicaWrapperCPU marks rows without an adapter by index -1 and then indexes the stacked weights with
it, so that a base-model row in a mixed batch gets the adapter of the *last* slot. It also copies A and B
once for every token. Here each adapter's rows are gathered once a step and get one product per module;
rows without an adapter are left alone.

Stock also applies an adapter of the output head in every step, though none is ever loaded (validation admits
linear layers only), and a request with prompt_logprobs in a mixed batch ends the engine there: the rows of
the prompt outnumber the indices of the samples. Here that step is left out.

Drop this when vLLM releases the repair (vllm-project/vllm, pull requests 48421 and 49656).
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from app.engine.worker import WorkerExtension

_update_metadata = PunicaWrapperCPU.update_metadata


def _group_rows(wrapper: Any, *arguments: Any, **keywords: Any) -> None:
    _update_metadata(wrapper, *arguments, **keywords)
    rows_of_slot: dict[int, list[int]] = {}
    slots = wrapper.token_lora_indices.tolist()
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows_of_slot.setdefault(slot, []).append(row)
    wrapper.rows_of_slot = [(slot, torch.tensor(rows)) for slot, rows in rows_of_slot.items()]


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
        inputs = x.index_select(0, rows)
        begin = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            delta = inputs @ a[slot, 0].t() @ b[slot, 0].t()
            y[:, begin : begin + width].index_add_(0, rows, delta.to(y.dtype), alpha=scale)
            begin += width


def _add_no_lora_logits(wrapper: Any, *_: Any, **__: Any) -> None:
    """The logits are right as they are."""


PunicaWrapperCPU.rows_of_slot = []  # until the first step with adapters
PunicaWrapperCPU.update_metadata = _group_rows
PunicaWrapperCPU.add_lora_linear = _add_lora_linear
PunicaWrapperCPU.add_lora_logits = _add_no_lora_logits

__all__ = ["WorkerExtension"]
