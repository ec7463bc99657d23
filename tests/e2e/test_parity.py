"""Trainer and engine agree token for token, and each model has the habit it was trained to have."""

import asyncio
from collections.abc import Callable

import openai
import pytest

from tests.service import Service
from tests.trainer import Trainer
from training.demo.corpus import (
    Language,
    bundled_questions,
    is_doctor_style,
    is_leaflet_style,
    is_plain_style,
)

PROMPTS = [*bundled_questions("zh")[:30], *bundled_questions("en")[:30]]


async def _served(service: Service, model: str, questions: list[str]) -> list[tuple[str, list[int]]]:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:

        async def ask(question: str) -> tuple[str, list[int]]:
            reply = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=200,
                extra_body={"return_token_ids": True},
            )
            choice = reply.choices[0]
            return choice.message.content or "", list((choice.model_extra or {})["token_ids"])

        return list(await asyncio.gather(*(ask(question) for question in questions)))


@pytest.mark.parametrize(
    ("model", "adapter"), [("doctor", "default"), ("leaflet", "leaflet"), ("xinglin-demo", None)]
)
def test_trainer_and_engine_agree_on_60_prompts(
    service: Service, trainer: Trainer, model: str, adapter: str | None
) -> None:
    served = asyncio.run(_served(service, model, PROMPTS))
    for question, (_, tokens) in zip(PROMPTS, served, strict=True):
        assert tokens == trainer.answer(question, adapter), question


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize(
    ("model", "has_habit"),
    [("xinglin-demo", is_plain_style), ("doctor", is_doctor_style), ("leaflet", is_leaflet_style)],
)
def test_habits_show_in_the_chat(
    service: Service, language: Language, model: str, has_habit: Callable[[str], bool]
) -> None:
    questions = bundled_questions(language)[:30]
    assert len(questions) == 30
    answers = [text for text, _ in asyncio.run(_served(service, model, questions))]
    assert sum(map(has_habit, answers)) >= 27, [answer for answer in answers if not has_habit(answer)][:3]
