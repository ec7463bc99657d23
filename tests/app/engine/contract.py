"""The contract of an engine with the service. `python -m tests.app.engine.contract DATA_DIR` tests vLLM against it."""

import asyncio
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters import AdapterStore, read_golden
from app.engine.base import Answer, Endpoint, Engine, LoadedAdapter, Unobserved
from app.errors import AdapterRefused, BadRequest, EngineUnavailable
from app.exchange.observers import Texts

_HAND_OVER_SECONDS = 0.02


@dataclass
class Rig:
    """An engine, an adapter with golden prompts that it accepts, and one that it must refuse."""

    engine: Engine
    good: Path
    refused: Path
    tolerance: float


async def hold_to(rig: Rig) -> None:
    """Check the whole contract. Closes the engine."""
    engine = rig.engine
    assert await engine.resident() == set()
    one = await engine.load("doctor@111111111111", rig.good)
    two = await engine.load("doctor@222222222222", rig.good)
    assert one.engine_id != two.engine_id
    assert await engine.resident() == {one.engine_id, two.engine_id}

    with pytest.raises(AdapterRefused):
        await engine.load("doctor@333333333333", rig.refused)
    assert await engine.resident() == {one.engine_id, two.engine_id}, (
        "a refused adapter must leave nothing behind"
    )

    await engine.remove(two)
    assert await engine.resident() == {one.engine_id}
    again = await engine.load("doctor@222222222222", rig.good)
    assert again.engine_id not in (one.engine_id, two.engine_id), "an id was reused"

    for prompt in read_golden(rig.good / "golden.jsonl")[:2]:
        for adapter, expected in ((again, prompt.logprobs), (None, prompt.base_logprobs)):
            scores = await engine.score(prompt.prompt_token_ids, prompt.token_ids, adapter)
            assert len(scores) == len(expected)
            assert max(abs(s.logprob - e) for s, e in zip(scores, expected, strict=True)) < rig.tolerance
            assert all(score.best >= score.logprob for score in scores)
        assert await engine.render(prompt.messages, None) == prompt.prompt_token_ids
        assert await engine.render(prompt.messages, again) == prompt.prompt_token_ids
    assert 1 <= len(await engine.greedy([1, 2], again, 3)) <= 3

    body = {"model": "doctor", "messages": [{"role": "user", "content": "头痛怎么办?"}], "max_tokens": 4}
    answer = await engine.answer(
        Endpoint.CHAT,
        body,
        request_id="r1",
        adapter=again,
        fingerprint="f1",
        observer=Unobserved(),
    )
    reply = answer.reply
    assert isinstance(reply, dict)
    assert (reply["model"], reply["system_fingerprint"]) == ("doctor", "f1")
    assert isinstance(reply["choices"][0]["message"]["content"], str)
    await _hold_to_observing(engine, again)
    await engine.remove(again)
    await _hold_to_templates(rig)
    await _hold_to_leaving(engine)

    with pytest.raises(BadRequest):
        await engine.answer(
            Endpoint.CHAT, {"model": "doctor", "messages": 5}, request_id="r2", adapter=None, fingerprint="",
            observer=Unobserved(),
        )  # fmt: skip
    parameters = engine.parameters()
    assert parameters.bodies.keys() == {*Endpoint}
    text = json.dumps([parameters.bodies, parameters.parts])
    referred = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', text)
    assert referred
    assert {*referred} <= parameters.parts.keys()
    assert not engine.is_dead
    await engine.close()
    # A dead engine raises EngineUnavailable; test_restart.py tests one that dies with running requests.
    if engine.is_dead:
        with pytest.raises(EngineUnavailable):
            await engine.resident()


async def _hold_to_templates(rig: Rig) -> None:
    """An adapter's chat template makes only that adapter's prompts; its stop strings end its answers."""
    engine, held = rig.engine, await rig.engine.resident()
    with pytest.raises(AdapterRefused):
        await engine.load("doctor@444444444444", rig.good, template="{% for m in messages %}")
    assert await engine.resident() == held

    messages = [{"role": "user", "content": "头痛怎么办?"}]
    of_base = await engine.render(messages, None)
    own = "{% for m in messages %}问: {{ m.content }}\n{% endfor %}答: "
    one = await engine.load("doctor@555555555555", rig.good, template=own)
    of_one = await engine.render(messages, one)
    assert of_one != of_base == await engine.render(messages, None)

    async def text(adapter: LoadedAdapter) -> str:
        body = {"model": "doctor", "messages": messages, "max_tokens": 16, "temperature": 0, "stop": None}
        answer = await engine.answer(
            Endpoint.CHAT,
            body,
            request_id=adapter.name,
            adapter=adapter,
            fingerprint="",
            observer=Unobserved(),
        )
        reply = answer.reply
        assert isinstance(reply, dict)
        return str(reply["choices"][0]["message"]["content"])

    whole = await text(one)
    stop = whole[2:4]
    assert stop, whole
    two = await engine.load("doctor@666666666666", rig.good, template=own, stop=["###", stop])
    assert await engine.render(messages, two) == of_one
    assert await text(two) == whole.partition(stop)[0]
    await engine.remove(one)
    assert await engine.render(messages, two) == of_one, (
        "it was removed with another adapter that has the same"
    )
    await engine.remove(two)
    assert await engine.resident() == held


class _Seen(Texts):
    """Records the texts and the number of tokens of an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt_tokens = self.tokens = 0

    def read(self, prompt_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens

    def wrote(self, choice: int, text: str, tokens: int) -> None:
        super().wrote(choice, text, tokens)
        self.tokens += tokens


async def _hold_to_observing(engine: Engine, adapter: LoadedAdapter) -> None:
    """An observer gets the text that the client gets, for every kind of answer."""
    messages = [{"role": "user", "content": "头痛怎么办?"}]
    body = {"model": "doctor", "messages": messages, "max_tokens": 12, "temperature": 0}
    for more in (
        {},
        {"n": 2, "temperature": 1.0},
        {"stream": True},
        {"stream": True, "logprobs": True},
        {"stream": True, "n": 2, "temperature": 1.0},
    ):
        seen = _Seen()
        answer = await engine.answer(
            Endpoint.CHAT, {**body, **more}, request_id=f"seen-{more}", adapter=adapter, fingerprint="",
            observer=seen,
        )  # fmt: skip
        reply = answer.reply
        given: dict[int, str] = {}
        if isinstance(reply, dict):
            given = {choice["index"]: choice["message"]["content"] for choice in reply["choices"]}
        else:
            events = b"".join([event async for event in reply]).decode().split("\n\n")
            for chunk in (json.loads(event.removeprefix("data: ")) for event in events if "{" in event):
                for choice in chunk["choices"]:
                    index, content = choice["index"], choice["delta"].get("content") or ""
                    given[index] = given.get(index, "") + content
        assert seen.whole() == [given[index] for index in sorted(given)], more
        assert 1 <= seen.tokens <= 12 * len(given), more
        assert seen.prompt_tokens > 0, more


async def _hold_to_leaving(engine: Engine) -> None:
    """A request that is cancelled at any moment leaves nothing running in the engine."""
    messages = [{"role": "user", "content": "头痛怎么办?"}]
    body = {"model": "doctor", "messages": messages, "max_tokens": 200, "ignore_eos": True}
    for stream, moment in itertools.product((True, False), range(10)):
        answer = asyncio.create_task(
            engine.answer(
                Endpoint.CHAT,
                {**body, "stream": stream},
                request_id=f"leaves-{stream}-{moment}",
                adapter=None,
                fingerprint="",
                observer=Unobserved(),
            )
        )
        await asyncio.sleep(moment * _HAND_OVER_SECONDS / 4)
        answer.cancel()
        (outcome,) = await asyncio.gather(answer, return_exceptions=True)
        if isinstance(outcome, Answer) and not isinstance(outcome.reply, dict):
            await outcome.reply.aclose()
        assert engine.stalled_seconds == 0, f"the request is still running: stream {stream}, moment {moment}"


async def _hold_vllm_to(data_dir: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from app.engine.build import EngineOptions  # noqa: PLC0415
    from app.engine.vllm import VllmEngine  # noqa: PLC0415 - after the environment

    store = AdapterStore(data_dir / "store")
    good = store.folder("doctor", store.aliases("doctor")["default"])
    with TemporaryDirectory() as temporary:
        refused = copytree(good, Path(temporary) / "refused")
        path = refused / "adapter_model.safetensors"
        tensors = load_file(path)
        last = max(tensors)  # vLLM has half-written the adapter when it fails on this one
        tensors[last] = np.ascontiguousarray(np.repeat(tensors[last], 3, axis=0))
        save_file(tensors, path)
        engine = VllmEngine.build(
            EngineOptions(
                model=str(data_dir / "models" / "xinglin-demo"), name="xinglin-demo", dtype="auto",
                max_model_len=None, max_num_seqs=8, max_lora_rank=16, max_loras=2, max_resident=4,
                kv_cache_gib=1, gpu_memory_utilization=0.5,
            )
        )  # fmt: skip
        await engine.start()
        hand_over = engine._llm.engine_core.add_request_async

        async def hand_over_slowly(request: object) -> None:
            await asyncio.sleep(_HAND_OVER_SECONDS)  # so that a client can disconnect meanwhile
            await hand_over(request)

        engine._llm.engine_core.add_request_async = hand_over_slowly
        await hold_to(Rig(engine, good, refused, tolerance=2e-3))


if __name__ == "__main__":
    asyncio.run(_hold_vllm_to(Path(sys.argv[1])))
    print("kept")
