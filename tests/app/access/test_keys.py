"""The admin key: its origin, and the routes it guards."""

import asyncio
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import Route

from app.access.keys import KEY_FILE, Access, stored_admin_key
from app.errors import Unauthorized
from app.main import create_app
from app.settings import Settings


def _request(authorization: str | None) -> Request:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize(
    "given", [None, "", "secret", "Basic secret", "Bearer", "Bearer ", "Bearer wrong", "Bearer secret2"]
)
def test_changes_are_refused_without_the_key(given: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        Access("secret", is_chat_open=True).require_admin(_request(given))
    assert "secret2" not in str(caught.value)


def test_the_key_allows_everything() -> None:
    access = Access("secret", is_chat_open=False)
    access.require_admin(_request("Bearer secret"))
    access.require_chat(_request("bearer secret"))


def test_chat_needs_the_key_only_beyond_loopback() -> None:
    Access("secret", is_chat_open=True).require_chat(_request(None))
    with pytest.raises(Unauthorized):
        Access("secret", is_chat_open=False).require_chat(_request("Bearer unused"))


def test_the_key_is_generated_once_and_readable_only_by_its_owner(tmp_path: Path) -> None:
    key = stored_admin_key(tmp_path / "data")
    assert len(key) > 30
    assert stored_admin_key(tmp_path / "data") == key
    path = tmp_path / "data" / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == [KEY_FILE]


@pytest.mark.parametrize(("headers", "is_let_in"), [
    ([(b"x-api-key", b"secret")], True),
    ([(b"x-api-key", b"wrong")], False),
    ([(b"authorization", b"Bearer wrong"), (b"x-api-key", b"secret")], False),
])  # fmt: skip
def test_the_key_is_accepted_in_x_api_key(headers: list[tuple[bytes, bytes]], is_let_in: bool) -> None:
    request = Request({"type": "http", "headers": headers})
    if is_let_in:
        Access("secret", is_chat_open=False).require_chat(request)
        return
    with pytest.raises(Unauthorized):
        Access("secret", is_chat_open=False).require_chat(request)


PROBES = {"/livez", "/readyz", "/metrics", "/health", "/ping", "/version", "/load"}
OPEN = PROBES | {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def test_beyond_loopback_every_route_checks_the_key_first(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path))
    routes = [
        (method, route.path.replace("{", "").replace("}", ""))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    ]
    open_ = {path for method, path in routes if asyncio.run(_status(app, method, path)) != 401}
    assert open_ == OPEN
    assert len(routes) > len(OPEN) + 20


async def _status(app: FastAPI, method: str, path: str) -> int:
    """Send a request without a key to a service whose state has nothing but the access."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [],
        "state": {"access": Access("secret", is_chat_open=False)},
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    with suppress(KeyError):  # open routes fail later: their state is missing
        await app(scope, receive, send)
    return int(sent[0]["status"])
