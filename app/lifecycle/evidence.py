"""The statistics of a proof, and the likely cause of a failure.

The trainer recorded the log-probability of each golden token under the base model, b, and with the adapter, a. The
engine computes B and A. They never agree exactly, since a bfloat16 number has only 8 bits. The trainer measured how far
that moves the scores of these very prompts (`Rounding`). So no single tolerance holds for all models. A proof compares

- the mean difference of the base model, |B - b|, and of the adapter, |A - a|, with the part that rounding explains;
- the adapter's effect in the engine, A - B, with its effect in training, a - b, by the slope of the line through them.

It uses means, not single tokens: among some hundred tokens of a correct adapter, one is often ten times as far off as
the mean. The limits were measured on correct and wrong adapters, see docs/en/proof.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapters import GoldenPrompt, Rounding
from app.engine.base import TokenScore

UNIT = {"bfloat16": 1.0, "float16": 1 / 8, "float32": 1 / 65536}
"""Rounding error relative to bfloat16: 8, 11 and 24 bits (IEEE 754; bfloat16 is float32's upper half)."""

UNMEASURED = Rounding(base=0.05, adapter=0.05)
"""The rounding of bfloat16 if the trainer did not measure it: twice that of real models."""

FLOOR = 1e-4
"""Nats. Kernels that sum in another order move a float32 mean by at most this."""

_WRONG_BASE, _WRONG_ADAPTER = 1.75, 1.35
"""With unlimited tokens, a mean difference of more than this many times rounding is an error."""

_FEW_BASE, _FEW_ADAPTER = 4.0, 8.5
"""Added to those factors, divided by the square root of the number of tokens, since a mean of few tokens is less
certain. The adapter's is larger, since single tokens of a strong adapter differ much."""

_SLOPE = 0.1
"""Allowed distance of the slope from 1, in addition to four standard errors."""

_SPREAD = 1.25
"""Ratio of standard deviation to mean absolute deviation in a normal distribution."""


@dataclass(frozen=True)
class Evidence:
    """The comparison over all golden tokens. Differences are in nats per token."""

    tokens: int
    base_difference: float
    """Mean of |B - b|."""
    adapter_difference: float
    """Mean of |A - a|."""
    effect: float
    """Mean of |A - B|: the adapter's effect in this engine."""
    expected_effect: float
    """Mean of |a - b|: the adapter's effect in training."""
    slope: float
    """Slope of A - B over a - b, by least squares through 0: 1 is the whole effect, 0.5 half of it, 0 none."""
    correlation: float
    """Correlation of A - B with a - b, through 0."""

    @property
    def is_number(self) -> bool:
        """Whether the engine's scores are finite numbers."""
        return math.isfinite(self.base_difference + self.adapter_difference)


def gather(
    golden: Sequence[GoldenPrompt],
    base: Sequence[Sequence[TokenScore]],
    adapter: Sequence[Sequence[TokenScore]],
) -> Evidence:
    """Compute the evidence from the engine's scores of each golden prompt, without and with the adapter."""
    was_base = [score for prompt in golden for score in prompt.base_logprobs]
    was = [score for prompt in golden for score in prompt.logprobs]
    is_base = [score.logprob for scores in base for score in scores]
    is_now = [score.logprob for scores in adapter for score in scores]
    expected = [one - other for one, other in zip(was, was_base, strict=True)]
    seen = [one - other for one, other in zip(is_now, is_base, strict=True)]
    along = _dot(expected, seen)
    length, other_length = math.sqrt(_dot(expected, expected)), math.sqrt(_dot(seen, seen))
    return Evidence(
        tokens=len(was),
        base_difference=_mean_difference(is_base, was_base),
        adapter_difference=_mean_difference(is_now, was),
        effect=_mean_difference(is_now, is_base),
        expected_effect=_mean_difference(was, was_base),
        slope=along / length**2 if length else 0.0,
        correlation=along / (length * other_length) if length and other_length else 0.0,
    )


def explained(rounding: Rounding, trainer_dtype: str, engine_dtype: str) -> Rounding:
    """Return the mean differences that rounding explains between a trainer and an engine of these dtypes."""
    both = math.hypot(UNIT[trainer_dtype], UNIT[engine_dtype])
    return Rounding(base=rounding.base * both + FLOOR / 2, adapter=rounding.adapter * both + FLOOR / 2)


@dataclass(frozen=True)
class Limits:
    """The limits of a proof, in nats per token."""

    base: float
    adapter: float
    slope: float
    """Largest allowed distance of the slope from 1; without a unit."""
    effect: float
    """Smallest effect that exceeds rounding."""


def limits(evidence: Evidence, rounding: Rounding | None, trainer_dtype: str, engine_dtype: str) -> Limits:
    """Return the limits for this many tokens.

    If the engine rounds the base model more than the trainer measured, the adapter's limit grows by the same factor.
    If the trainer measured nothing, the base model's own difference estimates the adapter's rounding.
    """
    root = math.sqrt(evidence.tokens)
    usual = explained(rounding or UNMEASURED, trainer_dtype, engine_dtype)
    of_adapter = usual.adapter if rounding else min(usual.adapter, evidence.base_difference + FLOOR / 2)
    coarser = max(1.0, evidence.base_difference / usual.base)
    noise = (usual.base if rounding else evidence.base_difference + FLOOR / 2) + of_adapter
    strength = max(evidence.expected_effect, noise) * root
    return Limits(
        base=usual.base * (_WRONG_BASE + _FEW_BASE / root),
        adapter=of_adapter * coarser * (_WRONG_ADAPTER + _FEW_ADAPTER / root),
        slope=_SLOPE + 4 * _SPREAD * noise / strength,
        effect=noise,
    )


def likely_cause(evidence: Evidence) -> str:
    """Return the likely cause of an adapter's difference from training, and the remedy."""
    if evidence.effect < 0.1 * evidence.expected_effect:
        return (
            "the engine answers as the base model does, as if the adapter were not applied; its module names may not "
            "match this base model: convert it again with --base, and publish the result"
        )
    if evidence.slope < -0.1:
        return "the adapter works in the opposite direction: its weights were changed after training; publish it again"
    if evidence.correlation > 0.8 and abs(evidence.slope - 1) > 0.1:
        word = "weakly" if evidence.slope < 1 else "strongly"
        return (
            f"it works too {word}, {evidence.slope:.2f} times as much as in training: lora_alpha, r or use_rslora in "
            "adapter_config.json differ from training, or weights are missing; publish the folder as training wrote it"
        )
    if evidence.correlation > 0.5:
        return (
            "it is applied in part or not as trained: layers or modules are missing, its weights or their scale "
            "(lora_alpha, r, use_rslora, alpha_pattern) were changed, or it was trained in another dtype than it "
            "states; publish the folder as training wrote it"
        )
    return (
        "it answers as another adapter would: the weights and the golden prompts do not belong together; publish "
        "both from the same run"
    )


def likely_base(evidence: Evidence, engine_dtype: str) -> str:
    """Return the likely cause of a base model's difference from training, and the remedy."""
    if evidence.correlation > 0.9 and abs(evidence.slope - 1) < 0.2:
        return (
            "the adapter's effect is as in training, so the base model is nearly the same: quantised, with a stretched "
            f"context, trained further or served in another dtype ({engine_dtype} here); serve the exact base model, "
            "or try XINGLIN_DTYPE=float32"
        )
    return (
        "it is another model: serve the base model that the adapter was trained on, or train it on this one"
    )


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
