"""The CPU head returns the same scores and gradients as TRL's head."""

from typing import Any

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from tests.training.tiny_models import ARCHITECTURES, tiny_model
from training.tokens.packing import IGNORED
from training.trainers.cpu_head import score_learnt_only

NOT_PLAIN = {"gemma2": "its scores are capped", "phi": "its head has a bias"}
LENGTHS = (9, 5, 1)


def frozen(architecture: str) -> Any:
    """A model as in a TRL trainer: all layers are trainable except embeddings and head."""
    model = tiny_model(architecture)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.requires_grad_(False)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Rows padded on the right, with some labels in each but the last."""
    torch.manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    is_row = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, 90, shape) * is_row
    labels = torch.where(is_row & (torch.rand(shape) < 0.7), ids, IGNORED)
    return {"input_ids": ids, "attention_mask": is_row.long(), "labels": labels}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_scores_and_gradients_equal_those_of_trls_head(architecture: str) -> None:
    found = []
    for is_ours in (False, True):
        model = frozen(architecture)
        before = model.forward
        if is_ours:
            score_learnt_only(model)
            assert (model.forward is before) == (architecture in NOT_PLAIN), NOT_PLAIN.get(architecture)
        out = model(**batch(), fused_lm_head=True)
        (out.log_probs * torch.arange(1.0, 9.0)).sum().backward()
        slopes = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        found.append((out, slopes))
    (theirs, their_slopes), (ours, our_slopes) = found
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.is_top1.bool(), theirs.is_top1.bool())
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert ours.label_mask.any()
    torch.testing.assert_close(our_slopes, their_slopes, rtol=1e-3, atol=1e-4)


def test_a_trainable_head_stays_trls() -> None:
    model = frozen("llama")
    model.get_output_embeddings().requires_grad_(True)
    before = model.forward
    score_learnt_only(model)
    assert model.forward == before


def test_tiling_does_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tile, rows in ((2**21, 256), (300, 1)):  # the second fits the scores of three tokens
        monkeypatch.setattr("training.trainers.cpu_head._TILE", tile)
        monkeypatch.setattr("training.trainers.cpu_head._ROWS", rows)
        model = frozen("qwen3")
        score_learnt_only(model)
        out = model(**batch(), fused_lm_head=True)
        out.log_probs.sum().backward()
        found.append((out.log_probs.detach(), model.get_decoder().norm.weight.grad))
    torch.testing.assert_close(found[0], found[1])


def test_generation_and_plain_calls_use_the_models_own_forward() -> None:
    model = frozen("llama")
    score_learnt_only(model)
    ids = batch()["input_ids"][:1]
    assert model(input_ids=ids, labels=ids).logits.shape == (1, 9, 96)
    assert model.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape[1] > 9
