"""An engine without a model, for tests of what happens around one. tests/app/engine/test_contract.py holds it
to what the real one does."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters import BaseModelFacts, read_golden
from app.engine.base import Answer, Endpoint, LoadedAdapter, Observer, Parameters, TokenScore
from app.engine.stats import EngineStats
from app.errors import AdapterRefused, BadRequest, EngineUnavailable, ResponseNotFound
from tests.adapters.folders import BASE

_REFUSED = "refuse-to-load"
"""A file of this name makes the engine refuse an adapter."""


class FakeEngine:
    """Answers with the name of the adapter, after `seconds` of work."""

    def __init__(self, facts: BaseModelFacts = BASE, *, seconds: float = 0.0) -> None:
        self.facts = facts
        self.dtype = "float32"
        self.max_model_len = 1000
        self.seconds = seconds
        self.is_dead = False
        self.stalled_seconds = 0.0
        self.stats = EngineStats()
        self.drift = 0.0
        """Added to the scores of prompts that are not golden, as another engine would score them."""
        self.held: dict[int, LoadedAdapter] = {}
        self.most_held = 0
        self.loads: Counter[str] = Counter()
        self.running: Counter[int] = Counter()
        self.most_adapters_running = 0
        self.broken_rules: list[str] = []
        self._ids = itertools.count(1)

    def _alive(self) -> None:
        if self.is_dead:
            raise EngineUnavailable("the engine stopped")

    async def load(
        self,
        name: str,
        folder: Path,
        *,
        template: str | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> LoadedAdapter:
        self._alive()
        adapter = LoadedAdapter(name, next(self._ids), folder, template, tuple(stop), tuple(stop_token_ids))
        if template is not None and template.count("{% for ") != template.count("{% endfor %}"):
            raise AdapterRefused(f"the chat template of {name} cannot be compiled")
        await asyncio.sleep(self.seconds)
        self._alive()
        if (folder.parent / _REFUSED).exists():
            raise AdapterRefused(f"the engine could not load {name}")
        self.held[adapter.engine_id] = adapter
        self.loads[name] += 1
        self.most_held = max(self.most_held, len(self.held))
        return adapter

    async def remove(self, adapter: LoadedAdapter) -> None:
        self._alive()
        await asyncio.sleep(0)
        if self.running[adapter.engine_id]:
            self.broken_rules.append(f"{adapter.name} was removed while a request used it")
        self.held.pop(adapter.engine_id, None)

    async def resident(self) -> set[int]:
        self._alive()
        return set(self.held)

    async def score(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], adapter: LoadedAdapter | None
    ) -> list[TokenScore]:
        async with self._request(adapter):
            for folder in [adapter.folder] if adapter else [a.folder for a in self.held.values()]:
                golden = folder / "golden.jsonl"
                for prompt in read_golden(golden) if golden.exists() else []:
                    if prompt.prompt_token_ids == list(prompt_token_ids):
                        scores = prompt.logprobs if adapter else prompt.base_logprobs
                        return [TokenScore(score, score) for score in scores]
        score = -0.1 if adapter else -1.0
        return [TokenScore(score + self.drift, score + self.drift) for _ in token_ids]

    async def greedy(
        self, prompt_token_ids: Sequence[int], adapter: LoadedAdapter | None, max_tokens: int
    ) -> list[int]:
        async with self._request(adapter):
            return [3] * max_tokens

    async def render(self, messages: Sequence[Mapping[str, Any]], adapter: LoadedAdapter | None) -> list[int]:
        if adapter is None or adapter.template is None:
            return [1, 2]
        return [ord(letter) for letter in adapter.template]

    async def tokenizer_info(self) -> dict[str, Any]:
        return {"tokenizer_class": "FakeTokenizer"}

    def parameters(self) -> Parameters:
        schema = {"type": "object", "properties": {"model": {"$ref": "#/components/schemas/Name"}}}
        return Parameters(dict.fromkeys(Endpoint, schema), {"Name": {"type": "string"}})

    async def answer(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        *,
        request_id: str,
        adapter: LoadedAdapter | None,
        fingerprint: str,
        observer: Observer,
    ) -> Answer:
        if not isinstance(body["messages"], list):
            raise BadRequest("messages: must be a list")
        async with self._request(adapter):
            content = adapter.name if adapter else "base"
            for stop in adapter.stop if adapter else ():
                content = content.partition(stop)[0]
            observer.read(2)
            observer.wrote(0, content, 1)
            assert endpoint is Endpoint.CHAT, "the fake engine only chats"
            reply = {
                "id": request_id,
                "model": body["model"],
                "system_fingerprint": fingerprint,
                "choices": [{"index": 0, "message": {"content": content}}],
            }
            return Answer(reply)

    async def retrieve(self, response_id: str, *, stream: bool, starting_after: int | None) -> dict[str, Any]:
        raise ResponseNotFound(f"there is no response {response_id}")

    async def cancel(self, response_id: str) -> dict[str, Any]:
        raise ResponseNotFound(f"there is no response {response_id}")

    async def delete(self, response_id: str) -> None:
        raise ResponseNotFound(f"there is no response {response_id}")

    async def close(self) -> None:
        self.is_dead = True

    def _request(self, adapter: LoadedAdapter | None) -> "_Request":
        return _Request(self, adapter)


class _Request:
    """Die of a request for an adapter that is not held, as the real engine does."""

    def __init__(self, engine: FakeEngine, adapter: LoadedAdapter | None) -> None:
        self._engine = engine
        self._id = adapter.engine_id if adapter else 0

    async def __aenter__(self) -> None:
        engine = self._engine
        engine._alive()
        if self._id and self._id not in engine.held:
            engine.is_dead = True
            engine.broken_rules.append(f"a request named {self._id}, which is not there")
        engine._alive()
        engine.running[self._id] += 1
        adapters = sum(count > 0 and id_ > 0 for id_, count in engine.running.items())
        engine.most_adapters_running = max(engine.most_adapters_running, adapters)
        try:
            await asyncio.sleep(engine.seconds)
            engine._alive()
        except BaseException:
            engine.running[self._id] -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._engine.running[self._id] -= 1
