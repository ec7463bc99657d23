"""A frozen output head on a CPU that computes scores only for learned tokens, and only once.

TRL's head saves memory, and skips other tokens on a GPU. On a CPU it also scores prompts and padding, and computes all
scores again in the backward pass. A frozen head does not need that: the gradient of its input can be computed with the
scores, as in Liger's fused cross-entropy (https://arxiv.org/abs/2410.10989).
"""

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

_TILE = 2**21
"""Scores computed at a time, unless _ROWS needs more: 8 MiB, which may fit into a processor's cache."""
_ROWS = 256
"""The fewest tokens scored at a time, as each time reads the whole head."""
_PROBE = 8  # tokens in the test of _is_plain


def score_learnt_only(model: Any) -> None:
    """Patch a TRL trainer's model to use this head if it can: on a CPU, with a frozen head that is a plain product."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    head = causal.get_output_embeddings()
    if causal.device.type != "cpu" or not is_frozen_product(head) or not _is_plain(causal):
        return
    trls = causal.forward

    @functools.wraps(trls)  # keeps the signature, in which `generate` looks up the model's arguments
    def forward(*args: Any, labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or kwargs.get("output_router_logits"):
            return trls(*args, labels=labels, fused_lm_head=fused_lm_head, **kwargs)
        # Padding is on the right, where no token that counts attends to it: causal attention needs no mask.
        kwargs |= {"use_cache": False, "attention_mask": None}
        hidden = causal.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        is_learnt = labels[:, 1:] >= 0
        found = score(hidden[is_learnt], head.weight, labels[:, 1:][is_learnt])
        log_probs, entropy, is_top1 = (
            one.new_zeros(is_learnt.shape).masked_scatter(is_learnt, one) for one in found
        )
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=is_learnt
        )

    causal.forward = forward


def is_frozen_product(head: Any) -> bool:
    """Return whether this is a frozen linear layer without a bias or an adapter."""
    return type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad


def score(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each token its label's log-probability in nats, the entropy in nats, and whether the label is the
    most likely token.

    Takes hidden states (tokens, hidden), the head's weight (vocabulary, hidden) and labels (tokens,). Only the
    log-probability has a gradient, and only with respect to the hidden states.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Scores.apply(hidden, weight, labels)
    return found


@torch.no_grad()
def _is_plain(causal: Any) -> bool:
    """Return whether the model's scores are exactly its last hidden state times the head.

    Tested on a forward pass, as some models scale or cap their scores, each by a differently named setting.
    """
    ids = torch.arange(_PROBE)[None] % causal.config.get_text_config().vocab_size
    was_training = causal.training
    causal.eval()
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
    scores = causal(input_ids=ids, use_cache=False).logits
    causal.train(was_training)
    return torch.allclose(scores, causal.get_output_embeddings()(hidden), rtol=1e-4, atol=1e-4)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any) -> Any:
        log_probs, entropy = hidden.new_empty(labels.shape), hidden.new_empty(labels.shape)
        is_top1 = torch.empty_like(labels, dtype=torch.bool)
        # d log p(label) / d hidden = weight[label] - sum over the vocabulary of p * weight
        slope = weight[labels] if ctx.needs_input_grad[0] else None
        rows = max(_ROWS, _TILE // len(weight))
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            scores = hidden[part] @ weight.T
            whole = scores.logsumexp(-1)
            log_probs[part] = scores.gather(-1, labels[part, None])[:, 0] - whole
            is_top1[part] = scores.argmax(-1) == labels[part]
            shares = (scores - whole[:, None]).exp_()
            entropy[part] = whole - torch.linalg.vecdot(shares, scores)
            if slope is not None:
                slope[part] -= shares @ weight
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return grad[:, None] * slope, None, None
