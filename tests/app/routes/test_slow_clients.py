"""Clients that stop reading or writing lose their resources after a time limit."""

import asyncio
import http.client
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request

from app.errors import BadRequest
from app.exchange import body, event_stream
from app.exchange.connection import CLIENT_LEFT
from app.settings import Settings
from tests.service import Service


async def _never(*_: Any) -> Any:
    await asyncio.Event().wait()


def test_a_client_that_stops_reading_frees_its_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "SEND_SECONDS", 0.05)
    ended: list[str | int] = []

    async def events() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            ended.append("aborted")

    async def check() -> None:
        stream = event_stream.EventStream(events(), {}, on_end=ended.append)
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(stream(scope, _never, _never), 5)

    asyncio.run(check())
    assert ended in ([CLIENT_LEFT], ["aborted", CLIENT_LEFT])


def test_a_body_that_never_ends_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_SECONDS", 0.05)
    request = Request({"type": "http", "method": "POST", "headers": []}, _never)
    with pytest.raises(BadRequest, match=r"longer than 0\.05 s"):
        asyncio.run(body.read_body(request))


def test_idle_connections_outlive_those_of_proxies(service: Service) -> None:
    """uvicorn's default of 5 s is shorter, and a request sent at that moment is lost."""
    assert Settings.model_fields["keep_alive_seconds"].default > 75
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request("GET", "/livez")
    connection.getresponse().read()
    first = connection.sock
    time.sleep(6)
    connection.request("GET", "/livez")
    assert connection.getresponse().read()
    assert connection.sock is first
    connection.close()
