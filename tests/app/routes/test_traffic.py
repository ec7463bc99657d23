"""Canary and shadow over HTTP: shares, stickiness, promotion, abort, and comparison of answers."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from adapters import AdapterStore
from tests.service import Service
from tests.trainer import Trainer

QUESTION = "What are the symptoms of gout?"


@pytest.fixture(scope="module")
def other(service: Service, trainer: Trainer) -> str:
    """A published revision of doctor with different answers, which no alias points at."""
    folder = trainer.variant(service.data_dir / "incoming" / "canary", seed=21, noise=2.0)
    status, reply = service.call(
        "POST", "/v1/adapters", {"name": "doctor", "path": str(folder), "alias": None}
    )
    assert status == 200, reply
    return str(reply["revision"])


@pytest.fixture
def default(service: Service) -> Iterator[str]:
    """The revision of doctor@default; ends canary and shadow and restores default afterwards."""
    revision = service.adapters()["doctor@default"]["actual"]
    yield revision
    for role in ("canary", "shadow"):
        service.call("DELETE", f"/v1/adapters/doctor/{role}")
    assert service.call("PUT", "/v1/adapters/doctor/aliases/default", {"revision": revision})[0] == 200
    assert service.call("GET", "/v1/adapters/doctor")[1]["traffic"] == {"canary": 0, "shadow": 0}


async def _sides(service: Service, sessions: list[str], *, by: str = "header") -> dict[str, str]:
    """Return the revision that answers each session."""
    limit = asyncio.Semaphore(32)

    async def one(client: aiohttp.ClientSession, session: str) -> str:
        body: dict[str, Any] = {
            "model": "doctor", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1,
        }  # fmt: skip
        headers = {}
        if by == "header":
            headers["x-session-id"] = session
        else:
            body["user"] = session
        async with (
            limit,
            client.post(f"{service.url}/v1/chat/completions", json=body, headers=headers) as reply,
        ):
            assert reply.status == 200, await reply.text()
            return reply.headers["x-adapter-revision"]

    async with aiohttp.ClientSession() as client:
        revisions = await asyncio.gather(*(one(client, session) for session in sessions))
    return dict(zip(sessions, revisions, strict=True))


def test_a_canary_of_ten_percent_over_2000_sessions(service: Service, default: str, other: str) -> None:
    path = "/v1/adapters/doctor/canary"
    status, reply = service.call("PUT", path, {"revision": other, "percent": 10})
    assert (status, reply["revision"], reply["percent"]) == (200, other, 10), reply
    assert service.adapters()["doctor@canary"]["percent"] == 10

    sessions = [f"patient-{number}" for number in range(2000)]
    sides = asyncio.run(_sides(service, sessions))
    share = sum(revision == other for revision in sides.values())
    assert set(sides.values()) == {default, other}
    assert abs(share - 200) <= 2.576 * (2000 * 0.1 * 0.9) ** 0.5, "outside the binomial 99 % interval"
    some = sessions[:300]
    assert asyncio.run(_sides(service, some)) == {session: sides[session] for session in some}
    assert asyncio.run(_sides(service, some, by="user")) == {session: sides[session] for session in some}

    assert service.call("PUT", path, {"percent": 40})[0] == 200
    wider = asyncio.run(_sides(service, some))
    assert all(wider[session] == other for session in some if sides[session] == other)
    assert sum(revision == other for revision in wider.values()) > 60

    # An abort applies to every request sent after its response.
    assert service.call("DELETE", path)[0] == 200
    assert set(asyncio.run(_sides(service, some)).values()) == {default}
    service.wait_for(lambda: f"doctor@{other}" not in service.adapters()["engine"]["held"])
    assert service.call("DELETE", path)[0] == 404


def test_promote_and_roll_back(service: Service, default: str, other: str) -> None:
    path = "/v1/adapters/doctor/canary"
    assert service.call("POST", f"{path}/promote")[0] == 404
    assert service.call("PUT", path, {"revision": other, "percent": 25})[0] == 200
    status, reply = service.call("POST", f"{path}/promote", {"why": "a quiet week"})
    assert (status, reply["revision"]) == (200, other), reply
    shown = service.adapters()
    assert shown["doctor@default"]["actual"] == other
    assert "doctor@canary" not in shown
    status, reply = service.call("POST", "/v1/adapters/doctor/rollback", {"revision": default})
    assert (status, reply["revision"]) == (200, default), reply
    log = service.call("GET", "/v1/adapters/doctor")[1]["log"]
    assert [entry["action"] for entry in log[-4:]] == ["promote", "split", "unpoint", "rollback"]
    assert log[-4]["why"] == "a quiet week"


def test_changes_by_command_line_are_followed(service: Service, default: str, other: str) -> None:
    def adapters(*arguments: str) -> None:
        command = [sys.executable, "-m", "adapters", "--store", str(service.data_dir / "store"), *arguments]
        subprocess.run(command, check=True, capture_output=True)

    adapters("canary", f"doctor@{other}", "100")
    service.wait_for(lambda: service.adapters().get("doctor@canary", {}).get("percent") == 100)
    assert set(asyncio.run(_sides(service, ["a", "b"])).values()) == {other}
    adapters("abort", "doctor")
    service.wait_for(lambda: "doctor@canary" not in service.adapters())
    assert set(asyncio.run(_sides(service, ["a", "b"])).values()) == {default}


def test_a_shadow_is_only_compared(service: Service, default: str, other: str) -> None:
    alone = service.answer("doctor", QUESTION)
    status, reply = service.call("PUT", "/v1/adapters/doctor/shadow", {"revision": other, "percent": 100})
    assert status == 200, reply
    path = service.data_dir / "shadow" / "doctor.jsonl"

    assert service.answer("doctor", QUESTION) == alone
    stream = service.client().chat.completions.create(
        model="doctor", messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == alone
    service.wait_for(lambda: len(_rows(path)) == 2)
    for row in _rows(path):
        assert (row["answered_by"], row["shadow"], row["same"]) == (default, other, False)
        assert row["characters"] == [len(alone)]
    assert "gout" not in path.read_text(), "questions and answers are kept only when asked for"
    assert 'xinglin_shadow_answers_total{adapter="doctor",outcome="different"} 2.0' in str(
        service.call("GET", "/metrics")[1]
    )

    # A revision that is its own shadow agrees with itself: copies are sent like their originals.
    assert service.call("PUT", "/v1/adapters/doctor/shadow", {"revision": default, "percent": 100})[0] == 200
    assert service.call("PUT", "/v1/adapters/doctor/canary", {"revision": other, "percent": 100})[0] == 200
    assert service.answer("doctor", QUESTION) == service.answer("doctor@canary", QUESTION)
    service.wait_for(lambda: len(_rows(path)) == 3)

    # Under load every answer is that of its revision, whatever happens to the copies.
    asyncio.run(_sides(service, [f"load-{number}" for number in range(200)]))
    assert service.answer("doctor@default", QUESTION) == service.answer(f"doctor@{other}", QUESTION)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("PUT", "canary", {"revision": "0" * 12, "percent": 10}, 404, "adapter_not_found"),
        ("PUT", "canary", {"percent": 10}, 404, "adapter_not_found"),
        ("PUT", "canary", {"revision": "0" * 12, "percent": 101}, 400, "invalid_value"),
        ("PUT", "canary", {"revision": "0" * 12, "percent": -1}, 400, "invalid_value"),
        ("PUT", "canary", b'{"revision": "000000000000", "percent": NaN}', 400, "invalid_value"),
        ("PUT", "shadow", {"revision": "zero", "percent": 1}, 400, "invalid_ref"),
        ("PUT", "shadow", {}, 400, "missing_required_parameter"),
        ("DELETE", "shadow", None, 404, "adapter_not_found"),
        ("POST", "canary/promote", None, 404, "adapter_not_found"),
        ("PUT", "../nobody/canary", {"revision": "0" * 12, "percent": 1}, 400, "invalid_ref"),
    ],
)
def test_wrong_requests(service: Service, method: str, path: str, body: Any, status: int, code: str) -> None:
    found, reply = service.call(method, f"/v1/adapters/doctor/{path}", body)
    assert (found, reply["error"]["code"]) == (status, code), reply
    assert service.call("GET", "/v1/adapters/doctor")[1]["traffic"] == {"canary": 0, "shadow": 0}


def test_show_diff_and_prune(service: Service, default: str, other: str) -> None:
    shown = service.call("GET", "/v1/adapters/doctor")[1]
    assert {default, other} <= {manifest["revision"] for manifest in shown["revisions"]}
    assert shown["aliases"] == {"default": default}
    status, diff = service.call("GET", f"/v1/adapters/doctor/diff?old=default&new={other}")
    assert (status, diff["old"], diff["new"]) == (200, default, other)
    assert diff["modules"][0]["moved"] > 0
    assert service.call("GET", "/v1/adapters/doctor/diff?old=nothing")[0] == 404
    assert service.call("GET", "/v1/adapters/nobody")[0] == 404
    status, reply = service.call("POST", "/v1/adapters/doctor/prune", {"keep": 1000})
    assert (status, reply["removed"]) == (200, [])
    assert AdapterStore(service.data_dir / "store").aliases("doctor") == {"default": default}


def test_every_wrong_field_is_reported(service: Service) -> None:
    status, reply = service.call("PUT", "/v1/adapters/doctor/canary", {"percent": 200, "revision": 7})
    assert status == 400
    assert {"percent", "revision"} <= {
        part.partition(":")[0] for part in reply["error"]["message"].split("; ")
    }
