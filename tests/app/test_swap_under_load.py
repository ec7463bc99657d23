"""Revisions are swapped under 32 running streams without disturbing any of them."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from adapters import AdapterStore
from tests.service import ADMIN_KEY, Service
from tests.trainer import Trainer

STREAMS = 32
SECONDS = float(os.environ.get("XINGLIN_TEST_SWAP_SECONDS", "15"))
REVISIONS = 6
MAX_TOKENS = 64  # some of the revisions never stop by themselves
ROLLBACKS_AFTER = (3, 6)
QUESTIONS = (
    "感冒有什么症状？",
    "如何预防糖尿病？",
    "What are the symptoms of gout?",
    "How can I prevent influenza?",
)
LIFE = ("loading", "proving", "ready", "draining")
GONE = "gone"
MODELS = ("doctor", "doctor", "leaflet", "xinglin-demo")


@dataclass
class Report:
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(revision or base, question, text)"""
    failures: list[str] = field(default_factory=list)
    lives: dict[str, list[str]] = field(default_factory=dict)
    """By revision, the sequence of statuses in GET /v1/adapters."""


async def _stream(client: openai.AsyncOpenAI, report: Report, until: float, seed: int) -> None:
    choice = random.Random(seed)
    while time.monotonic() < until:
        model, question = choice.choice(MODELS), choice.choice(QUESTIONS)
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=MAX_TOKENS,
                stream=True,
            )
            text, finish = "", None
            async for chunk in raw.parse():
                text += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
        except openai.OpenAIError as error:
            report.failures.append(repr(error))
            continue
        if finish not in ("stop", "length"):
            report.failures.append(f"ended with {finish}")
        revision = raw.headers.get("x-adapter-revision")
        report.answers.append((f"{model}@{revision}" if revision else model, question, text))


async def _operate(service: Service, folders: list[str]) -> None:
    async def call(method: str, path: str, body: Any) -> None:
        status, reply = await asyncio.to_thread(service.call, method, path, body, ADMIN_KEY)
        assert status == 200, reply

    pause = SECONDS / (len(folders) + len(ROLLBACKS_AFTER) + 1) / 2
    for number, folder in enumerate(folders, start=1):
        await asyncio.sleep(pause)
        # The engine takes one adapter at a time: `doctor` is seen to wait for the other, however fast loading is.
        other = asyncio.create_task(call("POST", "/v1/adapters", {"name": "other", "path": folder}))
        await asyncio.sleep(0.02)
        await call("POST", "/v1/adapters", {"name": "doctor", "path": folder})
        await other
        if number in ROLLBACKS_AFTER:
            await asyncio.sleep(pause)
            await call("POST", "/v1/adapters/doctor/rollback", {})


async def _watch(service: Service, report: Report) -> None:
    """Record every change of a revision's status, until cancelled."""
    while True:
        shown = await asyncio.to_thread(service.adapters)
        statuses = shown["engine"]["revisions"]
        for ref, seen in report.lives.items():
            if ref not in statuses and seen[-1] != GONE:
                seen.append(GONE)
        for ref, status in statuses.items():
            seen = report.lives.setdefault(ref, [])
            if not seen or seen[-1] != status:
                seen.append(status)
        await asyncio.sleep(0.005)


async def _run(service: Service, folders: list[str]) -> Report:
    report = Report()
    until = time.monotonic() + SECONDS
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
        streams = [_stream(client, report, until, seed) for seed in range(STREAMS)]
        watching = asyncio.create_task(_watch(service, report))
        await asyncio.gather(_operate(service, folders), *streams)
        watching.cancel()
    return report


@pytest.fixture(scope="module")
def folders(service: Service, trainer: Trainer) -> list[str]:
    incoming = service.data_dir / "incoming"
    return [
        str(trainer.variant(incoming / f"swap-{seed}", seed=100 + seed, noise=2.0))
        for seed in range(REVISIONS)
    ]


@pytest.fixture
def first(service: Service) -> Iterator[str]:
    """The revision at doctor@default, restored after the test because other tests share the service."""
    revision: str = service.adapters()["doctor@default"]["actual"]
    yield revision
    assert service.call("PUT", "/v1/adapters/doctor/aliases/default", {"revision": revision})[0] == 200


def test_swap_under_load(service: Service, folders: list[str], first: str) -> None:
    for alias in service.adapters().keys() - {"engine"}:
        service.answer(alias, QUESTIONS[0])  # loads it again if an earlier test evicted it
    report = asyncio.run(_run(service, folders))

    assert not report.failures, Counter(report.failures).most_common(3)
    for ref, seen in report.lives.items():
        life = (
            seen[: seen.index("draining") + 1] if "draining" in seen else seen
        )  # a rollback begins a new life
        steps = [LIFE.index(status) for status in life if status != GONE]
        assert steps == sorted(steps), (ref, seen)
    assert any(seen[:4] == [*LIFE] for seen in report.lives.values()), report.lives
    answered_by = Counter(who for who, _, _ in report.answers)
    assert len([who for who in answered_by if who.startswith("doctor@")]) >= REVISIONS // 2, answered_by

    # The engine itself reports only revisions that aliases or rollbacks need.
    def is_tidy() -> bool:
        shown = service.adapters()
        held = set(shown.pop("engine")["held"])
        pointed, kept = (
            {f"{entry['name']}@{entry[which]}" for entry in shown.values()}
            for which in ("actual", "rollback_to")
        )
        seen.update(pointed=pointed, held=held, kept=kept)
        return pointed <= held <= pointed | kept

    seen: dict[str, set[str]] = {}
    try:
        service.wait_for(is_tidy)
    except AssertionError as error:
        raise AssertionError(f"not tidied up: {seen}") from error

    # Every answer equals the one its revision gives without other requests.
    store = AdapterStore(service.data_dir / "store")
    for who in answered_by:
        asked = {question for name, question, _ in report.answers if name == who}
        if "@" in who:
            name, revision = who.split("@")
            path = f"/v1/adapters/{name}/aliases/alone"
            assert service.call("PUT", path, {"revision": revision})[0] == 200
        model = f"{name}@alone" if "@" in who else who
        for question in asked:
            alone = service.answer(model, question, max_tokens=MAX_TOKENS)
            given = {
                text for name_, question_, text in report.answers if (name_, question_) == (who, question)
            }
            assert given == {alone}, (who, question)
    for name in ("doctor", "leaflet"):
        store.remove_alias(name, "alone", actor="test")
    assert service.call("DELETE", "/v1/adapters/other/aliases/default")[0] == 200
    assert service.call("PUT", "/v1/adapters/doctor/aliases/default", {"revision": first})[0] == 200
    service.wait_for(is_tidy)
    print(f"\n{len(report.answers)} answers by {dict(answered_by)}")
