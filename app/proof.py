"""Proof of effect: the adapter that answers is the adapter that was trained.

The trainer wrote down how likely it found each of its own greedy tokens, with the adapter and without.
The live engine scores the same tokens both ways. It must agree with the trainer on both, and hold every
token for the likeliest; and the two must differ, or the adapter has no effect.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from adapters import GoldenPrompt
from app.engine.base import Engine, LoadedAdapter, TokenScore
from app.errors import AdapterRefused, BadRequest

# Largest difference in natural log-probability that rounding explains, by the coarser of the two dtypes.
# float32 was measured at 5e-5 between transformers and vLLM on CPU; half precision keeps 8 (bfloat16) or
# 11 (float16) bits, which grows to about these over the layers of an 8 B model.
TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.3}
_MIN_EFFECT = 3.0
"""An adapter must move at least one token's log-probability by this many tolerances."""


@dataclass(frozen=True)
class Proof:
    """What was seen. Differences are in natural log-probability, the largest over all tokens."""

    prompts: int
    tokens: int
    adapter_difference: float
    base_difference: float
    effect: float


async def prove(
    engine: Engine, adapter: LoadedAdapter, golden: Sequence[GoldenPrompt], trainer_dtype: str
) -> Proof:
    """Replay golden prompts on the live engine, one at a time so that other streams hardly notice.

    Raises AdapterRefused saying what was expected and what was seen.
    """
    tolerance = max(TOLERANCE[trainer_dtype], TOLERANCE[engine.dtype])
    tokens, worst_adapter, worst_base, effect = 0, 0.0, 0.0, 0.0
    for number, prompt in enumerate(golden, start=1):
        where = f"{adapter.name} failed its proof at golden prompt {number} of {len(golden)}"
        try:
            rendered = await engine.render(prompt.messages)
            base, scores = await _score_both(engine, adapter, prompt)
        except BadRequest as error:
            raise AdapterRefused(f"{where}: the engine cannot replay it: {error}") from error
        if rendered != prompt.prompt_token_ids:
            raise AdapterRefused(
                f"{where}: the chat template makes other tokens of it here than in training (expected "
                f"{len(prompt.prompt_token_ids)} tokens, saw {len(rendered)}): serve it on the base model and "
                "tokenizer it was trained with"
            )
        difference, at = _worst(base, prompt.base_logprobs)
        if not difference <= tolerance:
            raise AdapterRefused(
                f"{where}: the base model alone is not the one it was trained on (log-probability of token "
                f"{at + 1}: expected {prompt.base_logprobs[at]:.4f}, saw {base[at].logprob:.4f}, tolerance "
                f"{tolerance:g})"
            )
        worst_base = max(worst_base, difference)
        difference, at = _worst(scores, prompt.logprobs)
        if not difference <= tolerance:
            raise AdapterRefused(
                f"{where}: it does not answer as it did in training (log-probability of token {at + 1}: "
                f"expected {prompt.logprobs[at]:.4f}, saw {scores[at].logprob:.4f}, tolerance {tolerance:g}): "
                "its weights were changed, or the engine applies them differently"
            )
        doubted = next((i for i, s in enumerate(scores) if s.best - s.logprob > tolerance), None)
        if doubted is not None:
            raise AdapterRefused(
                f"{where}: token {doubted + 1} was its likeliest in training and is not here (log-probability "
                f"{scores[doubted].logprob:.4f}, the likeliest has {scores[doubted].best:.4f})"
            )
        worst_adapter = max(worst_adapter, difference)
        effect = max(effect, *(abs(s.logprob - b.logprob) for s, b in zip(scores, base, strict=True)))
        tokens += len(scores)
    if effect < _MIN_EFFECT * tolerance:
        raise AdapterRefused(
            f"{adapter.name} failed its proof: it has no effect (no token's log-probability differs from the base "
            f"model's by more than {effect:.2g}, expected at least {_MIN_EFFECT * tolerance:.2g}): was it trained?"
        )
    return Proof(len(golden), tokens, worst_adapter, worst_base, effect)


async def _score_both(
    engine: Engine, adapter: LoadedAdapter, prompt: GoldenPrompt
) -> tuple[list[TokenScore], list[TokenScore]]:
    """The scores of the base model and of the adapter, asked for together."""
    scored = await asyncio.gather(
        engine.score(prompt.prompt_token_ids, prompt.token_ids, None),
        engine.score(prompt.prompt_token_ids, prompt.token_ids, adapter),
        return_exceptions=True,  # both have ended when this returns: the adapter may be removed then
    )
    for one in scored:
        if isinstance(one, BaseException):
            raise one
    base, with_adapter = scored
    return base, with_adapter  # type: ignore[return-value]


def _worst(scores: Sequence[TokenScore], expected: Sequence[float]) -> tuple[float, int]:
    """The largest difference and its index; a NaN counts as the largest."""
    differences = [abs(score.logprob - logprob) for score, logprob in zip(scores, expected, strict=True)]
    at = max(
        range(len(differences)),
        key=lambda i: float("inf") if differences[i] != differences[i] else differences[i],
    )
    return differences[at], at
