"""Right weights in mixed batches: other requests in a batch do not change an answer."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.service import Service, free_port
from training.demo.corpus import bundled_questions

MODELS = ("xinglin-demo", "doctor", "leaflet")
REPAIRED = ("-m", "app", "serve")
STOCK = ("-m", "tests.app.engine.serve_without_repair")


def _asked(count: int) -> list[tuple[str, str]]:
    """Return pairs (model, question) in every language, without the same question twice in a row for one model."""
    questions = [
        q for pair in zip(bundled_questions("zh"), bundled_questions("en"), strict=False) for q in pair
    ]
    return [(MODELS[at % 3], questions[at % len(questions)]) for at in range(count)]


async def _answers(service: Service, asked: list[tuple[str, str]], *, at_once: bool) -> list[list[int]]:
    """Return the greedy token ids of every answer."""

    async def answer(client: openai.AsyncOpenAI, model: str, question: str) -> list[int]:
        reply = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        extra: dict[str, Any] = reply.choices[0].model_extra or {}
        return list(extra["token_ids"])

    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
        waiting = [answer(client, model, question) for model, question in asked]
        if at_once:
            return list(await asyncio.gather(*waiting))
        return [await one for one in waiting]


def _wrong(service: Service, asked: list[tuple[str, str]], alone: list[list[int]]) -> list[tuple[str, str]]:
    together = asyncio.run(_answers(service, asked, at_once=True))
    return [what for what, one, mixed in zip(asked, alone, together, strict=True) if one != mixed]


@pytest.fixture(scope="module")
def alone(service: Service) -> list[list[int]]:
    return asyncio.run(_answers(service, _asked(64), at_once=False))


@pytest.fixture(params=[REPAIRED, STOCK], ids=["repaired", "stock"])
def tight(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[tuple[Service, bool]]:
    """A service, and whether it has the repair. It has as many slots as the demo has adapters, since an empty last slot
    hides stock's defect."""
    service = Service(data_dir, free_port(), {"XINGLIN_MAX_LORAS": "1"}, request.param)
    service.start()
    yield service, request.param == REPAIRED
    service.stop()


def test_64_mixed_requests_answer_as_each_alone(tight: tuple[Service, bool], alone: list[list[int]]) -> None:
    """Answers are right with the repair, and wrong without it, which shows that this test can fail.

    When vLLM fixes the defect, the second case fails: then remove app/engine/cpu_worker.py.
    """
    assert len({tuple(answer) for answer in alone}) > 50, "the answers are too alike to tell models apart"
    service, is_repaired = tight
    wrong = _wrong(service, _asked(64), alone)
    assert {model for model, _ in wrong} == (set() if is_repaired else {"xinglin-demo"})
