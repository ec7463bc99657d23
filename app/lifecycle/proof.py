"""Proof that the adapter that answers is the adapter that was trained.

The trainer recorded the log-probability of each of its own greedy tokens, with the adapter and without. The live engine
scores the same tokens both ways. Over all tokens it must agree with the trainer on both, as far as rounding allows, and
the adapter must move the base model as much as it did in training (`app.lifecycle.evidence`).
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from adapters import GoldenPrompt, Rounding
from app.engine.base import Engine, LoadedAdapter, TokenScore
from app.errors import BadRequest, ProofFailed
from app.lifecycle.evidence import Evidence, gather, likely_base, likely_cause, limits

_AT_ONCE = 2
"""Golden prompts scored together: enough to keep the engine busy, too few to stall a step."""

T = TypeVar("T")

_RECORDED_TOKENS = 32
# Prompts to record an adapter that has no golden prompts: short and everyday, in both languages.
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
    """The result of a proof, and the limit for proving the revision again."""

    prompts: int
    evidence: Evidence
    most_telling: int
    """Index of the golden prompt on which the adapter differs most from the base model."""
    still_right: float
    """Largest mean difference from the trainer's scores for that prompt after a reload, in nats per token."""


@dataclass(frozen=True)
class _Replay:
    """The engine's scores of one golden prompt."""

    base: list[TokenScore]
    adapter: list[TokenScore]


async def prove(
    engine: Engine,
    adapter: LoadedAdapter,
    golden: Sequence[GoldenPrompt],
    trainer_dtype: str,
    rounding: Rounding | None = None,
) -> Proof:
    """Replay golden prompts on the live engine, a few at a time so that other streams hardly slow down.

    `rounding` is the trainer's measurement of bfloat16. Raises ProofFailed with the expected and the actual numbers,
    the likely cause and the remedy.
    """
    replays: list[_Replay] = []
    for begin in range(0, len(golden), _AT_ONCE):
        replays += await _all_ended(
            _replay(engine, adapter, prompt, f"golden prompt {number} of {len(golden)}")
            for number, prompt in enumerate(golden[begin : begin + _AT_ONCE], start=begin + 1)
        )
    evidence = gather(golden, [one.base for one in replays], [one.adapter for one in replays])
    allowed = _judge(adapter.name, engine.dtype, evidence, rounding, trainer_dtype)
    telling = [
        gather([prompt], [one.base], [one.adapter]) for prompt, one in zip(golden, replays, strict=True)
    ]
    most = max(range(len(telling)), key=lambda at: telling[at].effect)
    return Proof(len(golden), evidence, most, telling[most].adapter_difference + 2 * allowed)


def _judge(
    name: str, engine_dtype: str, evidence: Evidence, rounding: Rounding | None, trainer_dtype: str
) -> float:
    """Judge the evidence and return the adapter's allowed difference. Raises ProofFailed."""
    where = f"{name} failed its proof"
    if not evidence.is_number:
        raise ProofFailed(
            f"{where}: the engine's scores are not finite: the weights hold NaN or infinity, or values overflow "
            f"{engine_dtype}; try XINGLIN_DTYPE=float32, or train the adapter again"
        )
    allowed = limits(evidence, rounding, trainer_dtype, engine_dtype)
    on = f"over {evidence.tokens} golden tokens"
    if evidence.base_difference > allowed.base:
        raise ProofFailed(
            f"{where}: the base model alone is not the one it was trained on ({on}, log-probabilities differ by "
            f"{evidence.base_difference:.2g} nats on average; rounding explains at most {allowed.base:.2g}): "
            f"{likely_base(evidence, engine_dtype)}"
        )
    if evidence.expected_effect < allowed.effect:
        raise ProofFailed(
            f"{where}: it has no effect ({on}, in training it moved log-probabilities by "
            f"{evidence.expected_effect:.2g} nats on average, which does not exceed rounding in {engine_dtype}, "
            f"{allowed.effect:.2g}): train it longer, or serve it in XINGLIN_DTYPE=float32"
        )
    if evidence.adapter_difference > allowed.adapter or abs(evidence.slope - 1) > allowed.slope:
        raise ProofFailed(
            f"{where}: it does not answer as it did in training ({on}, log-probabilities differ by "
            f"{evidence.adapter_difference:.2g} nats on average, and rounding explains at most "
            f"{allowed.adapter:.2g}; its effect is {evidence.slope:.2f} times that of training): "
            f"{likely_cause(evidence)}"
        )
    return allowed.adapter


async def _replay(engine: Engine, adapter: LoadedAdapter, prompt: GoldenPrompt, which: str) -> _Replay:
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
            f"{where}: the chat template renders other tokens here than in training (expected "
            f"{len(prompt.prompt_token_ids)} tokens, saw {len(rendered)}): publish it with the chat_template.jinja it "
            "was trained with, and serve it on its own base model and tokenizer"
        )
    return _Replay(base, scores)


async def _all_ended(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results or raise the first error, but only when all calls have ended: then the adapter may go."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


async def prove_again(
    engine: Engine, adapter: LoadedAdapter, golden: Sequence[GoldenPrompt], proof: Proof
) -> None:
    """Prove a revision again after a reload into the same engine, with its most telling prompt alone.

    Every module of an adapter takes part in every token, so one prompt reveals wrong weights. The other prompts checked
    the base model and the template, which have not changed. Raises ProofFailed.
    """
    prompt = golden[proof.most_telling]
    scores = await engine.score(prompt.prompt_token_ids, prompt.token_ids, adapter)
    difference = gather([prompt], [scores], [scores]).adapter_difference
    if not difference <= proof.still_right:
        raise ProofFailed(
            f"{adapter.name} failed its proof when it was loaded again: over {len(scores)} golden tokens, "
            f"log-probabilities differ by {difference:.2g} nats on average from training, and its first proof here "
            f"allows {proof.still_right:.2g}: its files or its memory in the engine were damaged; restart the service, "
            "and publish it again if that does not help"
        )


async def record(engine: Engine, adapter: LoadedAdapter) -> list[GoldenPrompt]:
    """Record the present answers of an adapter without golden prompts, as golden prompts for later loads."""
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
