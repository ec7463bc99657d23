"""Trainer and engine agree token for token, and each model has the habit it was trained to have."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import yaml

from adapters import AdapterRef, AdapterStore
from tests.service import Service
from tests.trainer import Trainer
from training.config import load_config
from training.demo.corpus import (
    SAFETY_LINE,
    Language,
    bundled_questions,
    is_doctor_style,
    is_leaflet_style,
    is_plain_style,
    write_corpus,
)
from training.runs.execute import begin, carry_out
from training.templates import named

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
    ("model", "adapter"),
    [
        ("doctor", "default"),
        ("leaflet", "leaflet"),
        ("doctor-ppo", "doctor-ppo"),
        ("xinglin-demo", None),
    ],
)
def test_trainer_and_engine_agree_on_60_prompts(
    service: Service, trainer: Trainer, model: str, adapter: str | None
) -> None:
    served = asyncio.run(_served(service, model, PROMPTS))
    for question, (_, tokens), expected in zip(
        PROMPTS, served, trainer.answers(PROMPTS, adapter), strict=True
    ):
        assert tokens == expected, question


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize(
    ("model", "has_habit"),
    [
        ("xinglin-demo", is_plain_style),
        ("doctor", is_doctor_style),
        ("leaflet", is_leaflet_style),
        ("doctor-ppo", lambda text: is_doctor_style(text) and text.endswith(tuple(SAFETY_LINE.values()))),
    ],
)
def test_habits_show_in_the_chat(
    service: Service, language: Language, model: str, has_habit: Callable[[str], bool]
) -> None:
    questions = bundled_questions(language)[:30]
    assert len(questions) == 30
    answers = [text for text, _ in asyncio.run(_served(service, model, questions))]
    assert sum(map(has_habit, answers)) >= 27, [answer for answer in answers if not has_habit(answer)][:3]


def test_what_any_stage_makes_is_what_is_served(service: Service, trainer: Trainer, tmp_path: Path) -> None:
    """A few steps of every other stage on the demo's base: each adapter is proved, and says what its trainer says.

    One that was trained on a base in 4 bits too: what its trainer says is said on the plain base.
    """
    write_corpus(service.data_dir / "demo")
    store = AdapterStore(service.data_dir / "store")
    reward = store.get(AdapterRef.parse("doctor-rm"))
    shared = {
        "base_model": "models/xinglin-demo", "learning_rate": 1e-3, "threads": 1,
        "golden": {"prompts": 8, "max_new_tokens": 16}, "publish": {"alias": "default"},
    }  # fmt: skip
    offline = {"max_steps": 2, "max_length": 256}
    fresh = {**offline, "learning_rate": 3e-2}  # enough to say something else than the base
    pairs = {"policy": "doctor@default", "train_files": ["demo/pairs.jsonl"], **offline}
    online = {
        "stage": "grpo", "policy": "doctor@default", "train_files": ["demo/doctor.jsonl"],
        "reward": f"doctor-rm@{reward.revision}", "steps": 1, "batch_size": 4, "generations": 2, "max_new_tokens": 16,
    }  # fmt: skip
    jobs: dict[str, dict[str, object]] = {
        "e2e-pt": {**fresh, "stage": "pt", "train_files": ["demo/documents.jsonl", "demo/doctor.jsonl"]},
        "e2e-4bit": {**fresh, "stage": "sft", "train_files": ["demo/doctor.jsonl"], "quantization": "4bit"},
        **{f"e2e-{stage}": {"stage": stage, **pairs} for stage in ("dpo", "kto", "orpo")},
        **{f"e2e-{algorithm}": {"algorithm": algorithm, **online} for algorithm in ("grpo", "rloo")},
    }
    questions = PROMPTS[::6]
    by_the_base = trainer.answers(questions, None)
    for name, job in jobs.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **shared, **job}))
        published = carry_out(
            begin(load_config(path, root=service.data_dir), service.data_dir), service.data_dir
        )
        manifest = store.get(AdapterRef.parse(published.ref))
        service.wait_for(
            lambda name=name: service.adapters().get(f"{name}@default", {}).get("status") == "ready"
        )
        assert service.adapters()[f"{name}@default"]["proven"]
        trainer.load(name, store.folder(name, manifest.revision))
        served = asyncio.run(_served(service, name, questions))
        for question, (_, tokens), expected in zip(
            questions, served, trainer.answers(questions, name), strict=True
        ):
            assert tokens == expected, (name, question)
        assert [tokens for _, tokens in served] != by_the_base
        store.remove_alias(name, "default", actor="test")


@pytest.mark.parametrize("template", ["bentsao-med", "huatuo"])
def test_what_is_trained_with_a_template_of_its_own_is_asked_with_it(
    service: Service, trainer: Trainer, tmp_path: Path, template: str
) -> None:
    """Plain chat messages become the prompts of BenTsao and of HuatuoGPT, and what ends their turns ends the answer."""
    write_corpus(service.data_dir / "demo")
    path, name = tmp_path / f"{template}.yaml", f"as-{template}"
    path.write_text(
        yaml.safe_dump(
            {
                "name": name, "stage": "sft", "base_model": "models/xinglin-demo", "chat_template": template,
                "train_files": ["demo/doctor.jsonl"], "max_steps": 2, "max_length": 256, "learning_rate": 1e-2,
                "threads": 1, "golden": {"prompts": 8, "max_new_tokens": 16}, "publish": {"alias": "default"},
            }
        )
    )  # fmt: skip
    published = carry_out(begin(load_config(path, root=service.data_dir), service.data_dir), service.data_dir)
    service.wait_for(lambda: service.adapters().get(f"{name}@default", {}).get("status") == "ready")
    store = AdapterStore(service.data_dir / "store")
    manifest = store.get(AdapterRef.parse(published.ref))
    shipped = named(template)
    assert tuple(manifest.stop) == shipped.stop
    trainer.load(name, store.folder(name, manifest.revision))
    questions = PROMPTS[::6]
    served = asyncio.run(_served(service, name, questions))
    with trainer.rendering_with(shipped.jinja):
        expected = trainer.answers(questions, name)
    for question, (text, tokens), ids in zip(questions, served, expected, strict=True):
        whole = trainer.tokenizer.decode(ids, skip_special_tokens=True)
        assert text == whole.partition(shipped.stop[0])[0], question
        assert tokens == ids[: len(tokens)]
    assert expected != trainer.answers(questions, name)
    store.remove_alias(name, "default", actor="test")
