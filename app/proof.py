"""Proof of effect: the adapter that answers is the adapter that was trained.

The trainer wrote down how likely it found each of its own greedy tokens, with the adapter and without.
The live engine scores the same tokens both ways. It must agree with the trainer on both, and hold every
token for the likeliest; and the two must differ, or the adapter has no effect.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from adapters import GoldenPrompt
from app.engine.base import Engine, LoadedAdapter, TokenScore
from app.errors import BadRequest, ProofFailed

# Largest difference in natural log-probability that rounding explains, by the coarser of the two dtypes.
# float32 was measured at 5e-5 between transformers and vLLM on CPU; half precision keeps 8 (bfloat16) or
# 11 (float16) bits, which grows to about these over the layers of an 8 B model.
TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.3}
_MIN_EFFECT = 3.0
"""An adapter must move at least one token's log-probability by this many tolerances."""

_AT_ONCE = 2
"""Golden prompts scored together: enough to keep the engine busy, and too few to stall a step."""

T = TypeVar("T")

_RECORDED_TOKENS = 32
# What an adapter without golden prompts is recorded on: short, everyday, in both languages.
_PROMPTS = (
    "你好，请介绍一下你自己。",
    "感冒了应该怎么办？",
    "高血压患者饮食上要注意什么？",
    "孩子发烧39度，需要马上去医院吗？",
    "Hello, who are you?",
    "What should I do about a headache?",
    "How is type 2 diabetes treated?",
    "Can I take ibuprofen together with aspirin?",
)


@dataclass(frozen=True)
class Proof:
    """What was seen. Differences are in natural log-probability, the largest over all tokens."""

    prompts: int
    tokens: int
    adapter_difference: float
    base_difference: float
    effect: float
    most_telling: int
    """The index of the golden prompt on which the adapter differs most from the base model."""


async def prove(
    engine: Engine, adapter: LoadedAdapter, golden: Sequence[GoldenPrompt], trainer_dtype: str
) -> Proof:
    """Replay golden prompts on the live engine, a few at a time so that other streams hardly notice.

    Raises ProofFailed saying what was expected and what was seen.
    """
    tolerance = _tolerance(engine, trainer_dtype)
    seen: list[_Seen] = []
    for begin in range(0, len(golden), _AT_ONCE):
        replays = [
            _replay(engine, adapter, prompt, tolerance, f"golden prompt {number} of {len(golden)}")
            for number, prompt in enumerate(golden[begin : begin + _AT_ONCE], start=begin + 1)
        ]
        seen += await _all_ended(replays)
    effect = max(one.effect for one in seen)
    if effect < _MIN_EFFECT * tolerance:
        raise ProofFailed(
            f"{adapter.name} failed its proof: it has no effect (no token's log-probability differs from the base "
            f"model's by more than {effect:.2g}, expected at least {_MIN_EFFECT * tolerance:.2g}): was it trained?"
        )
    return Proof(
        prompts=len(golden),
        tokens=sum(len(prompt.token_ids) for prompt in golden),
        adapter_difference=max(one.adapter_difference for one in seen),
        base_difference=max(one.base_difference for one in seen),
        effect=effect,
        most_telling=[one.effect for one in seen].index(effect),
    )


@dataclass(frozen=True)
class _Seen:
    adapter_difference: float
    base_difference: float
    effect: float


async def _replay(
    engine: Engine, adapter: LoadedAdapter, prompt: GoldenPrompt, tolerance: float, which: str
) -> _Seen:
    where = f"{adapter.name} failed its proof at {which}"
    try:
        rendered = await engine.render(prompt.messages, adapter)
        base, scores = await _all_ended(
            [
                engine.score(prompt.prompt_token_ids, prompt.token_ids, None),
                engine.score(prompt.prompt_token_ids, prompt.token_ids, adapter),
            ]
        )
    except BadRequest as error:
        raise ProofFailed(f"{where}: the engine cannot replay it: {error}") from error
    if rendered != prompt.prompt_token_ids:
        raise ProofFailed(
            f"{where}: the chat template makes other tokens of it here than in training (expected "
            f"{len(prompt.prompt_token_ids)} tokens, saw {len(rendered)}): publish it with the chat_template.jinja it "
            "was trained with, and serve it on the base model and tokenizer"
        )
    base_difference, at = _worst(base, prompt.base_logprobs)
    if not base_difference <= tolerance:
        raise ProofFailed(
            f"{where}: the base model alone is not the one it was trained on (log-probability of token "
            f"{at + 1}: expected {prompt.base_logprobs[at]:.4f}, saw {base[at].logprob:.4f}, tolerance "
            f"{tolerance:g})"
        )
    return _Seen(
        adapter_difference=_check(where, prompt, scores, tolerance),
        base_difference=base_difference,
        effect=max(abs(s.logprob - b.logprob) for s, b in zip(scores, base, strict=True)),
    )


async def _all_ended(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, or the first error; either way all have ended then, and the adapter may be removed."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


async def prove_again(
    engine: Engine, adapter: LoadedAdapter, golden: Sequence[GoldenPrompt], trainer_dtype: str, proof: Proof
) -> None:
    """After a reload into an engine in which it proved itself before: replay its most telling prompt.

    Every module of an adapter takes part in every token, so one prompt tells wrong weights from right ones;
    what the others told, of base model and template, has not changed since. Raises ProofFailed.
    """
    prompt = golden[proof.most_telling]
    scores = await engine.score(prompt.prompt_token_ids, prompt.token_ids, adapter)
    where = f"{adapter.name} failed its proof when it was loaded again"
    _check(where, prompt, scores, _tolerance(engine, trainer_dtype))


async def record(engine: Engine, adapter: LoadedAdapter) -> list[GoldenPrompt]:
    """What an adapter that brings no golden prompts says here and now, to hold it to from now on."""
    golden = []
    for text in _PROMPTS:
        messages = [{"role": "user", "content": text}]
        prompt = await engine.render(messages, adapter)
        token_ids = await engine.greedy(prompt, adapter, _RECORDED_TOKENS)
        base = await engine.score(prompt, token_ids, None)
        scores = await engine.score(prompt, token_ids, adapter)
        golden.append(
            GoldenPrompt(
                messages=messages,
                prompt_token_ids=prompt,
                token_ids=token_ids,
                logprobs=[score.logprob for score in scores],
                base_logprobs=[score.logprob for score in base],
            )
        )
    return golden


def _tolerance(engine: Engine, trainer_dtype: str) -> float:
    return max(TOLERANCE[trainer_dtype], TOLERANCE[engine.dtype])


def _check(where: str, prompt: GoldenPrompt, scores: Sequence[TokenScore], tolerance: float) -> float:
    """The largest difference from the trainer's scores. Raises ProofFailed where it is too large."""
    difference, at = _worst(scores, prompt.logprobs)
    if not difference <= tolerance:
        raise ProofFailed(
            f"{where}: it does not answer as it did in training (log-probability of token {at + 1}: "
            f"expected {prompt.logprobs[at]:.4f}, saw {scores[at].logprob:.4f}, tolerance {tolerance:g}): "
            "its weights were changed, or the engine applies them differently"
        )
    doubted = next((i for i, s in enumerate(scores) if s.best - s.logprob > tolerance), None)
    if doubted is not None:
        raise ProofFailed(
            f"{where}: token {doubted + 1} was its likeliest in training and is not here (log-probability "
            f"{scores[doubted].logprob:.4f}, the likeliest has {scores[doubted].best:.4f})"
        )
    return difference


def _worst(scores: Sequence[TokenScore], expected: Sequence[float]) -> tuple[float, int]:
    """The largest difference and its index; a NaN counts as the largest."""
    differences = [abs(score.logprob - logprob) for score, logprob in zip(scores, expected, strict=True)]
    at = max(
        range(len(differences)),
        key=lambda i: float("inf") if differences[i] != differences[i] else differences[i],
    )
    return differences[at], at
