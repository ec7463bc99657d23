"""Every request is counted once and releases its resources, however it ends; on a fake engine."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from adapters import write_golden
from app.access.admission import Admission
from app.access.keys import Access
from app.engine.base import Answer, Endpoint, LoadedAdapter, Observer
from app.errors import ApiError, BadRequest, EngineFailed, ModelNotFound, TooManyRequests, Unauthorized
from app.exchange.connection import CLIENT_LEFT
from app.exchange.shadow import Shadow
from app.exchange.steps import respond
from tests.adapters.folders import GOLDEN, make_folder
from tests.app.fake_engine import FakeEngine
from tests.app.lifecycle.rig import Rig

BODY = {"model": "doctor", "messages": []}


class Streaming(FakeEngine):
    """Streams three words, or fails after the first; `rest` is the background work of a request."""

    def __init__(self) -> None:
        super().__init__()
        self.rest: asyncio.Future[Any] | None = None
        self.aborted = 0

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
        if body.get("background"):
            self.rest = asyncio.get_running_loop().create_future()
            return Answer({"status": "queued"}, rest=self.rest)
        if not body.get("stream"):
            return await super().answer(
                endpoint, body, request_id=request_id, adapter=adapter, fingerprint=fingerprint,
                observer=observer,
            )  # fmt: skip

        async def events() -> AsyncGenerator[bytes]:
            try:
                observer.read(5)
                for word in ("one ", "two ", "three"):
                    observer.wrote(0, word, 1)
                    yield f"data: {word}\n\n".encode()
                    if body["stream"] == "broken":
                        raise EngineFailed("it broke")
                    await asyncio.sleep(0)
                yield b"data: [DONE]\n\n"
            finally:
                self.aborted += 1

        return Answer(events())


class Client:
    """A client of a service that has only the state a request needs."""

    def __init__(self, rig: Rig, folder: Path, *, places: int = 4) -> None:
        self.rig = rig
        self.admission = Admission(places, rig.metrics.in_flight)
        self.shadow = Shadow(folder / "shadow", rig.bases, rig.metrics, keep_texts=True)
        self.sent: list[Any] = []

    async def ask(
        self,
        body: Any,
        *,
        key: str = "secret",
        leaves: asyncio.Event | None = None,
        path: Endpoint | None = Endpoint.CHAT,
    ) -> int:
        """Send the whole response and return its status."""
        is_read = False

        async def receive() -> dict[str, Any]:
            nonlocal is_read
            if not is_read:
                is_read = True
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                return {"type": "http.request", "body": content}
            await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)

        state = {
            "access": Access("secret", is_chat_open=False),
            "admission": self.admission,
            "bases": self.rig.bases,
            "metrics": self.rig.metrics,
            "operations": self.rig.operations,
            "served_models": self.rig.served,
            "shadow": self.shadow,
        }
        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {
            "type": "http", "method": "POST", "headers": headers, "state": state,
            "asgi": {"spec_version": "2.3"},
        }  # fmt: skip
        response = await respond(Request(scope, receive, send), path)
        await response(scope, receive, send)
        return response.status_code

    def counted(self) -> dict[tuple[str, str], float]:
        """Counted requests, by adapter and status."""
        (family,) = self.rig.metrics.requests.collect()
        return {
            (sample.labels["adapter"], sample.labels["status"]): sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def holds_nothing(self) -> bool:
        """Whether no place, lease or slot is held."""
        residency = self.rig.base.residency
        leases = [residency.leases(one.loaded.name) for one in residency.residents()]
        return not (self.admission.in_flight or sum(leases) or residency.slots_taken)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path)
    path = make_folder(tmp_path / "doctor").write()
    write_golden(path / "golden.jsonl", [GOLDEN])
    revision = rig.store.publish(path, "doctor", actor="test").revision
    rig.store.set_alias("doctor", "default", revision, actor="test")
    return rig


@pytest.mark.parametrize(
    ("body", "outcome", "counted"),
    [
        (BODY, 200, {("doctor", "200"): 1.0}),
        ({**BODY, "model": "tiny"}, 200, {("tiny", "200"): 1.0}),
        ({**BODY, "stream": True}, 200, {("doctor", "200"): 1.0}),
        ({**BODY, "stream": "broken"}, 200, {("doctor", "500"): 1.0}),
        ({**BODY, "messages": 5}, BadRequest, {("doctor", "400"): 1.0}),
        ({**BODY, "model": "nobody"}, ModelNotFound, {("unknown", "404"): 1.0}),
        ({"messages": []}, BadRequest, {("unknown", "400"): 1.0}),
        (b"{", BadRequest, {("unknown", "400"): 1.0}),
    ],
)
def test_every_request_is_counted_once_and_releases_everything(
    rig: Rig, tmp_path: Path, body: Any, outcome: int | type[ApiError], counted: dict[tuple[str, str], float]
) -> None:
    async def check() -> None:
        async with rig.running():
            await rig.start("tiny", Streaming())
            client = Client(rig, tmp_path)
            if isinstance(outcome, int):
                assert await client.ask(body) == outcome
            else:
                with pytest.raises(outcome):
                    await client.ask(body)
            assert client.counted() == counted
            assert client.holds_nothing()

    asyncio.run(check())


def test_unauthorized_requests_are_not_counted(rig: Rig, tmp_path: Path) -> None:
    async def check() -> None:
        client = Client(rig, tmp_path)
        with pytest.raises(Unauthorized):
            await client.ask(BODY, key="wrong")
        assert client.counted() == {}

    asyncio.run(check())


def test_requests_beyond_the_limit_are_refused(rig: Rig, tmp_path: Path) -> None:
    async def check() -> None:
        client = Client(rig, tmp_path, places=0)
        with pytest.raises(TooManyRequests):
            await client.ask(BODY)
        assert client.counted() == {("unknown", "429"): 1.0}

    asyncio.run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_disconnects(rig: Rig, tmp_path: Path, stream: bool) -> None:
    async def check() -> None:
        async with rig.running():
            await rig.start("tiny", engine := Streaming())
            engine.seconds = 60  # delays whole answers, not streams
            client, leaves = Client(rig, tmp_path), asyncio.Event()
            leaves.set()
            status = await asyncio.wait_for(client.ask({**BODY, "stream": stream}, leaves=leaves), 10)
            assert status == (200 if stream else CLIENT_LEFT)
            assert client.counted() == {("doctor", str(CLIENT_LEFT)): 1.0}
            assert client.holds_nothing()
            assert engine.aborted == stream

    asyncio.run(check())


def test_background_work_is_held_and_counted_until_it_ends(rig: Rig, tmp_path: Path) -> None:
    async def check() -> None:
        async with rig.running():
            await rig.start("tiny", engine := Streaming())
            client = Client(rig, tmp_path)
            assert await client.ask({**BODY, "background": True}, path=Endpoint.RESPONSES) == 200
            assert client.counted() == {}
            assert not client.holds_nothing()
            assert engine.rest is not None
            engine.rest.set_result(None)
            await asyncio.sleep(0)
            assert client.counted() == {("doctor", "200"): 1.0}
            assert client.holds_nothing()

    asyncio.run(check())
