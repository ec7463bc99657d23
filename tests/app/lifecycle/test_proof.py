"""What a proof makes of the scores of right and wrong adapters. The scores are made here: no model takes part.

tests/bench/proof.py takes them from real engines and models.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters import GoldenPrompt, Rounding
from app.engine.base import LoadedAdapter, TokenScore
from app.errors import ProofFailed
from app.lifecycle.evidence import gather, limits
from app.lifecycle.proof import Proof, prove, prove_again
from tests.app.fake_engine import FakeEngine

ADAPTER = LoadedAdapter("doctor@0123456789ab", 1, Path())
PROMPTS, TOKENS = 8, 32
BFLOAT16 = Rounding(base=0.025, adapter=0.023)  # measured on SmolLM2-135M with rows of the NIH

Change = Callable[[float, float], float]


class Scripted(FakeEngine):
    """Scores each golden prompt as scripted."""

    def __init__(self, golden: Sequence[GoldenPrompt], dtype: str = "bfloat16") -> None:
        super().__init__()
        self.dtype = dtype
        self.golden = list(golden)
        self.base: Change = lambda base, _: base
        self.adapted: Change = lambda _, adapted: adapted

    async def render(self, messages: Any, adapter: Any) -> list[int]:
        return next(one.prompt_token_ids for one in self.golden if one.messages == list(messages))

    async def score(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], adapter: Any
    ) -> list[TokenScore]:
        one = next(one for one in self.golden if one.prompt_token_ids == list(prompt_token_ids))
        change = self.adapted if adapter else self.base
        found = [change(b, a) for b, a in zip(one.base_logprobs, one.logprobs, strict=True)]
        return [TokenScore(score, score) for score in found]


def golden_set(strength: float = 1.0, seed: int = 0) -> list[GoldenPrompt]:
    """Log-probabilities like those of a trained adapter: most tokens hardly move, some by several nats."""
    chance = random.Random(seed)
    prompts = []
    for number in range(PROMPTS):
        base = [-chance.expovariate(0.6) for _ in range(TOKENS)]
        adapted = [b + strength * chance.gauss(0.2, 0.4) * chance.expovariate(1) for b in base]
        prompts.append(
            GoldenPrompt(
                messages=[{"role": "user", "content": str(number)}],
                prompt_token_ids=[number],
                token_ids=list(range(TOKENS)),
                logprobs=adapted,
                base_logprobs=base,
            )
        )
    return prompts


@pytest.fixture
def engine() -> Scripted:
    return Scripted(golden_set())


def rounded(chance: random.Random, mean: float) -> float:
    """A realistic rounding error: normal, and occasionally ten times as large."""
    return chance.gauss(0, mean) * (6 if chance.random() < 0.02 else 1)


def hold(engine: Scripted, rounding: Rounding | None = BFLOAT16, trainer_dtype: str = "float32") -> Proof:
    return asyncio.run(prove(engine, ADAPTER, engine.golden, trainer_dtype, rounding))


@pytest.mark.parametrize("seed", range(20))
def test_rounding_and_a_single_outlier_token_pass(seed: int) -> None:
    engine, chance = Scripted(golden_set(seed=seed)), random.Random(seed)
    engine.base = lambda base, _: base + rounded(chance, BFLOAT16.base * 1.1)
    engine.adapted = lambda _, adapted: adapted + rounded(chance, BFLOAT16.adapter * 1.1)
    proof = hold(engine)
    assert proof.evidence.tokens == PROMPTS * TOKENS
    engine.base = lambda base, _: (
        base + (0.378 if abs(base - engine.golden[1].base_logprobs[4]) < 1e-9 else 0)
    )
    engine.adapted = lambda _, adapted: adapted
    hold(engine)


WRONG: dict[str, tuple[Change, str]] = {
    "half": (lambda b, a: b + (a - b) / 2, r"it works too weakly, 0\.50 times"),
    "double": (lambda b, a: b + (a - b) * 2, r"it works too strongly, 2\.00 times"),
    "not applied": (lambda b, a: b, "answers as the base model does"),
    "sign-flipped": (lambda b, a: b - (a - b), "works in the opposite direction"),
    "in part": (lambda b, a: a if int(1e6 * b) % 3 else b, "it is applied in part"),
    "another's": (lambda b, a: b + (0.5 if int(1e6 * b) % 2 else -0.5), "as another adapter would"),
    "NaN": (lambda b, a: float("nan"), "are not finite"),
    "infinity": (lambda b, a: float("-inf"), "are not finite"),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rounding", [BFLOAT16, None])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_are_refused_with_their_cause(kind: str, rounding: Rounding | None, dtype: str) -> None:
    engine = Scripted(golden_set(), dtype)
    engine.adapted, words = WRONG[kind]
    with pytest.raises(ProofFailed, match=words):
        hold(engine, rounding)


def test_another_and_a_nearly_identical_base_model_are_refused(engine: Scripted) -> None:
    engine.base = lambda base, _: base * 0.5
    with pytest.raises(
        ProofFailed, match=r"the base model alone is not .*it is another model: serve the base"
    ):
        hold(engine)
    chance = random.Random(1)
    shifts: dict[float, float] = {}

    def shifted(base: float) -> float:
        return shifts.setdefault(base, base + chance.gauss(0, 0.15))

    engine.base = lambda base, _: shifted(base)
    engine.adapted = lambda base, adapted: shifted(base) + adapted - base
    with pytest.raises(ProofFailed, match=r"the base model is nearly the same: quantised.*XINGLIN_DTYPE"):
        hold(engine)


@pytest.mark.parametrize(("dtype", "is_seen"), [("float32", True), ("float16", True), ("bfloat16", False)])
def test_an_effect_must_exceed_rounding(dtype: str, is_seen: bool) -> None:
    engine = Scripted(golden_set(strength=0.05), dtype)
    if is_seen:
        hold(engine)
    else:
        with pytest.raises(ProofFailed, match=r"it has no effect .*serve it in XINGLIN_DTYPE=float32"):
            hold(engine)


def test_limits_are_wider_for_fewer_tokens(engine: Scripted) -> None:
    golden = engine.golden

    def of(prompts: int) -> float:
        scores = [[TokenScore(score, score) for score in one.logprobs] for one in golden[:prompts]]
        base = [[TokenScore(score, score) for score in one.base_logprobs] for one in golden[:prompts]]
        return limits(gather(golden[:prompts], base, scores), BFLOAT16, "float32", "bfloat16").adapter

    assert of(1) > of(4) > of(8) > BFLOAT16.adapter


def test_limits_are_wider_for_a_coarser_dtype(engine: Scripted) -> None:
    scores = [[TokenScore(score, score) for score in one.logprobs] for one in engine.golden]
    base = [[TokenScore(score, score) for score in one.base_logprobs] for one in engine.golden]
    evidence = gather(engine.golden, base, scores)

    def room(trainer: str, engine_dtype: str) -> float:
        return limits(evidence, BFLOAT16, trainer, engine_dtype).adapter

    fine = room("float32", "float32")
    assert 10 * fine < room("float32", "float16") < room("float32", "bfloat16") < room("bfloat16", "bfloat16")
    assert room("bfloat16", "float32") == room("float32", "bfloat16")


def test_a_reload_is_proved_against_the_first_proof(engine: Scripted) -> None:
    proof = hold(engine)
    asyncio.run(prove_again(engine, ADAPTER, engine.golden, proof))
    for kind in ("half", "not applied", "another's", "NaN"):
        engine.adapted, _ = WRONG[kind]
        with pytest.raises(ProofFailed, match="when it was loaded again"):
            asyncio.run(prove_again(engine, ADAPTER, engine.golden, proof))
    damaged = replace(proof, still_right=0.0)
    engine.adapted = lambda _, adapted: adapted + 1e-6
    with pytest.raises(ProofFailed):
        asyncio.run(prove_again(engine, ADAPTER, engine.golden, damaged))
