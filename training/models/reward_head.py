"""Where a reward is read: one place for training, for RL and for whoever else asks.

It is read at the last token that the attention mask counts. transformers looks for the last token that is not the
padding token: where padding is done with the end token, it reads the token before, and in another place than a reader
who pads otherwise.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput


def at_last(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Of `values`, (n, length, ...), those at the last token that `attention_mask`, (n, length), counts: (n, ...)."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * places).argmax(1)
    return values[torch.arange(len(values), device=values.device), last]


def read_by_mask(model: Any) -> None:
    """Have a model with a score head of one number give it at the last token that counts."""

    def forward(
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutput:
        hidden = model.base_model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        counted = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        return SequenceClassifierOutput(logits=model.score(at_last(hidden, counted)))

    model.forward = forward
