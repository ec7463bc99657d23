"""The token position at which a reward is read: the same for training, RL and all other callers.

It is the last token that the attention mask counts. transformers takes the last token that is not the padding token:
where the end token is also the padding token, it reads one token too early, and the position depends on the padding.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput


def at_last(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Select from `values` (n, length, ...) the last token that `attention_mask` (n, length) counts: (n, ...)."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * places).argmax(1)
    return values[torch.arange(len(values), device=values.device), last]


def read_by_mask(model: Any) -> None:
    """Patch a model with a one-number score head to score at the last token that the attention mask counts."""

    def forward(
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutput:
        hidden = model.base_model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        counted = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        return SequenceClassifierOutput(logits=model.score(at_last(hidden, counted)))

    model.forward = forward
