"""Settings of the HTTP front: CORS origins, and the root path behind a proxy."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.testclient import TestClient

from app.main import _app
from app.settings import Settings

PAGE = "https://app.example.org"


@asynccontextmanager
async def nothing(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    yield {"bases": []}


def client(**settings: Any) -> TestClient:
    return TestClient(_app(Settings(**settings), nothing))


def preflight(front: TestClient, origin: str) -> Any:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization, content-type"
    return front.options("/v1/chat/completions", headers=asked)


@pytest.mark.parametrize("allowed", [PAGE, f"http://localhost:3000 {PAGE}", "*"])
def test_allowed_origins(allowed: str) -> None:
    with client(cors_origins=allowed) as front:
        reply = preflight(front, PAGE)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "authorization" in reply.headers["access-control-allow-headers"]
        shown = front.get("/livez", headers={"origin": PAGE}).headers["access-control-expose-headers"]
        assert "x-request-id" in shown


def test_other_origins_are_refused() -> None:
    with client(cors_origins=PAGE) as front:
        assert preflight(front, "https://evil.example.org").status_code == 400
    with client() as front:
        assert preflight(front, PAGE).status_code == 405


@pytest.mark.parametrize("path", ["/livez", "/llm/livez"])
def test_a_proxy_may_keep_or_strip_its_path(path: str) -> None:
    with client(root_path="/llm") as front:
        assert front.get(path).json() == {"status": "alive"}
        assert front.get(path.replace("livez", "openapi.json")).json()["servers"] == [{"url": "/llm"}]


def test_errors_keep_their_endpoints_shape_behind_a_proxy() -> None:
    with client(root_path="/llm") as front:
        for path in ("/v1/messages", "/llm/v1/messages"):
            assert front.get(path).status_code == 405
    with client() as front:
        assert front.get("/llm/livez").status_code == 404


@pytest.mark.parametrize("path", ["llm", "/llm/", "/a b", "/?x"])
def test_an_invalid_root_path_is_rejected(path: str) -> None:
    with pytest.raises(ValidationError):
        Settings(root_path=path)


def test_every_response_has_a_request_id() -> None:
    with client(cors_origins=PAGE) as front:
        for method, path, status in (
            ("GET", "/livez", 200),
            ("GET", "/nowhere", 404),
            ("PUT", "/livez", 405),
        ):
            reply = front.request(method, path, headers={"x-request-id": "trace-4711"})
            assert (reply.status_code, reply.headers["x-request-id"]) == (status, "trace-4711")
        assert len(front.get("/livez").headers["x-request-id"]) == 32
        assert "x-request-id" in preflight(front, PAGE).headers


def test_tokenizer_info_is_off_by_default() -> None:
    with client() as front:
        assert front.get("/tokenizer_info").status_code == 404
    with client(tokenizer_info=True) as front:
        assert "/tokenizer_info" in front.get("/openapi.json").json()["paths"]
