"""What golden prompts tell of base model and adapter: the statistics of a proof, and what a failure is likely due to.

A trainer wrote down the log-probability of each golden token under the base model, b, and with the adapter, a; the
engine found B and A. Two sides never agree exactly: a number of bfloat16 has 8 bits. How far that moves the scores of
these very prompts the trainer has measured (`Rounding`). So the rule is not one tolerance for all models. It compares

- the mean difference of the base model, |B - b|, and of the adapter, |A - a|, with what rounding explains, and
- the effect of the adapter as the engine has it, A - B, with what it was, a - b, by the slope of the line through them.

One token's difference is no measure: among some hundred tokens of a right adapter, one is often ten times as far off as
the mean. Measured on right and wrong adapters, see docs/proof.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapters import GoldenPrompt, Rounding
from app.engine.base import TokenScore

UNIT = {"bfloat16": 1.0, "float16": 1 / 8, "float32": 1 / 65536}
"""How coarse numbers are, as a share of bfloat16: 8, 11 and 24 bits (IEEE 754; bfloat16 is float32's upper half)."""

UNMEASURED = Rounding(base=0.05, adapter=0.05)
"""What bfloat16 does to a model whose trainer has not measured it: twice what was seen of real models."""

FLOOR = 1e-4
"""Nats. Sums in another order, as other kernels build them, move a mean of float32 by at most this."""

_WRONG_BASE, _WRONG_ADAPTER = 1.75, 1.35
"""A mean difference of so many times what rounding explains is no rounding, were there no end of tokens."""

_FEW_BASE, _FEW_ADAPTER = 4.0, 8.5
"""What is added to those times, over the root of the number of tokens: a mean of few says less. More of an adapter's,
since single tokens of a strong one differ much."""

_SLOPE = 0.1
"""How far the slope may be from 1, beside four standard errors."""

_SPREAD = 1.25
"""Standard deviation over mean absolute difference, of a normal distribution."""


@dataclass(frozen=True)
class Evidence:
    """What was seen on all golden tokens. Differences are in nats a token."""

    tokens: int
    base_difference: float
    """Mean of |B - b|."""
    adapter_difference: float
    """Mean of |A - a|."""
    effect: float
    """Mean of |A - B|: how far the adapter moves the base model here."""
    expected_effect: float
    """Mean of |a - b|."""
    slope: float
    """Of A - B over a - b, by least squares through 0: 1 is the whole effect, 0.5 half of it, 0 none."""
    correlation: float
    """Of A - B with a - b, through 0."""

    @property
    def is_number(self) -> bool:
        """Whether the engine gave numbers at all."""
        return math.isfinite(self.base_difference + self.adapter_difference)


def gather(
    golden: Sequence[GoldenPrompt],
    base: Sequence[Sequence[TokenScore]],
    adapter: Sequence[Sequence[TokenScore]],
) -> Evidence:
    """Put together what the engine found of each golden prompt, without and with the adapter."""
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
    """The mean differences that rounding alone makes between a trainer and an engine of those dtypes."""
    both = math.hypot(UNIT[trainer_dtype], UNIT[engine_dtype])
    return Rounding(base=rounding.base * both + FLOOR / 2, adapter=rounding.adapter * both + FLOOR / 2)


@dataclass(frozen=True)
class Limits:
    """What a right adapter keeps to, in nats a token."""

    base: float
    adapter: float
    slope: float
    """The most that the slope may differ from 1."""
    effect: float
    """The least effect that stands out from rounding."""


def limits(evidence: Evidence, rounding: Rounding | None, trainer_dtype: str, engine_dtype: str) -> Limits:
    """The limits for this many tokens.

    Where the engine rounds the base model more than the trainer's measurement says, it may round the adapter so too.
    Where nothing was measured, the base model's own difference tells what rounding does to the adapter.
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
    """What the numbers say of an adapter that does not answer as in training, and what an operator can do."""
    if evidence.effect < 0.1 * evidence.expected_effect:
        return (
            "the engine answers as the base model does, as if the adapter were not applied: were its modules' names "
            "those of this base model? Convert it again with --base, and publish that"
        )
    if evidence.slope < -0.1:
        return "the adapter works in the opposite direction: its weights were changed after training; publish it again"
    if evidence.correlation > 0.8 and abs(evidence.slope - 1) > 0.1:
        word = "weakly" if evidence.slope < 1 else "strongly"
        return (
            f"it works too {word}, {evidence.slope:.2f} times as much as in training: lora_alpha, r or use_rslora in "
            "adapter_config.json are not those of training, or weights are missing; publish it as training wrote it"
        )
    if evidence.correlation > 0.5:
        return (
            "it is applied in part or otherwise than it was trained: layers or modules are missing, its weights or "
            "their scale (lora_alpha, r, use_rslora, alpha_pattern) were changed, or it was trained in another dtype "
            "than it says; publish it as training wrote it"
        )
    return (
        "it answers as another adapter would: these weights and these golden prompts do not belong together; publish "
        "both from one run"
    )


def likely_base(evidence: Evidence, engine_dtype: str) -> str:
    """What the numbers say of a base model that is not the one of training, and what an operator can do."""
    if evidence.correlation > 0.9 and abs(evidence.slope - 1) < 0.2:
        return (
            "its effect is as in training, so that the base model is nearly the same: quantised, stretched, further "
            f"trained or served in another dtype ({engine_dtype} here); serve the very base model, or try "
            "XINGLIN_DTYPE=float32"
        )
    return (
        "it is another model: serve the base model that the adapter was trained on, or train it on this one"
    )


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
