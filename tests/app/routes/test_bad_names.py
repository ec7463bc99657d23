"""Unsafe or invalid names, aliases and requests: 4xx, and nothing is written."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from adapters import AdapterStore
from tests.app.spoilt import demo_folder, listing, publish
from tests.service import Service


@pytest.fixture(scope="module")
def store(service: Service) -> AdapterStore:
    return AdapterStore(service.data_dir / "store")


@pytest.fixture(scope="module")
def folder(service: Service, store: AdapterStore) -> Path:
    """A valid adapter."""
    path = service.data_dir / "incoming" / "sound"
    path.parent.mkdir(exist_ok=True)
    return demo_folder(path, store).write()


NAMES = [
    "", ".", "..", "../x", "a/b/c", "a%2Fb", "%2e%2e", "a\\b", "a b", "doctor ", " doctor", "a/", "/a",
    "dоctor", "医生", "👩‍⚕️", "x" * 10_000, "-rf", ".hidden", "a..b", "a\0b", "a\nb", "a\u202eb", "doctor@default",
    "doctor@", "@", "~", "$HOME", "con:x", "a*", "xinglin-demo",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_unsafe_names_are_refused(service: Service, folder: Path, name: str) -> None:
    before = listing(service.data_dir, "incoming")
    status, reply = publish(service, folder, name, alias="default")
    assert 400 <= status < 500, reply
    assert len(json.dumps(reply)) < 2000
    assert str(service.data_dir) not in json.dumps(reply)
    status, _ = service.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
    assert 400 <= status < 500
    assert listing(service.data_dir, "incoming") == before


@pytest.mark.parametrize(
    "name", [*NAMES, "a/../doctor", "./doctor", "doctor;x"], ids=lambda name: ascii(name)[:20]
)
def test_names_in_the_path_of_a_request(service: Service, store: AdapterStore, name: str) -> None:
    before, revision = listing(service.data_dir, "incoming"), store.aliases("doctor")["default"]
    for quoted in {quote(name, safe=""), quote(name, safe="./%:*~@;$")} - {"."}:
        for method, path, body in (
            ("GET", f"/v1/adapters/{quoted}", None),
            ("GET", f"/v1/adapters/{quoted}/diff?old=default", None),
            ("PUT", f"/v1/adapters/{quoted}/aliases/default", {"revision": revision}),
            ("DELETE", f"/v1/adapters/{quoted}/aliases/default", None),
            ("POST", f"/v1/adapters/{quoted}/rollback", {}),
            ("POST", f"/v1/adapters/{quoted}/prune", {"keep": 0}),
            ("PUT", f"/v1/adapters/{quoted}/canary", {"percent": 10, "revision": revision}),
            ("POST", f"/v1/adapters/{quoted}/canary/promote", {}),
        ):
            if name == "" and path == "/v1/adapters/":
                continue
            status, reply = service.call(method, path, body)
            assert 400 <= status < 500, (method, path[:80], reply)
            assert str(service.data_dir) not in json.dumps(reply)
    assert store.aliases("doctor") == {"default": revision}
    assert listing(service.data_dir, "incoming") == before


@pytest.mark.parametrize(
    "alias", ["..", "a/b", "UP", "x" * 10_000, "0" * 12, "a b", "é", "a@b", ".x", 7, [], {}]
)
def test_invalid_aliases_are_refused(service: Service, folder: Path, alias: Any) -> None:
    before = listing(service.data_dir, "incoming")
    status, reply = publish(service, folder, alias=alias)
    assert status == 400, reply
    assert listing(service.data_dir, "incoming") == before


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b'"doctor"', b"{}", b'{"name": "doctor"}', b'{"name": NaN}', b"\xff\xfe{}",
        b"[" * 100_000, b'{"name":' * 100_000, b" " * (2 << 20), b'{"name": "doctor", "path": 7}',
        b'{"name": "doctor", "path": {}, "alias": "default"}', b'{"name": "doctor", "path": "x", "extra": 1}',
        b'{"name": "doctor", "path": "\\ud800"}', b'{"name": "\\ud800", "path": "x"}',
        b'{"name": "doctor", "path": "' + b"x" * 5000 + b'"}', b'{"name": ' + b"9" * 5000 + b"}",
        b'{"name": "doctor", "path": "x", "why": "' + b"x" * 501 + b'"}',
    ],
    ids=lambda body: body[:30].decode(errors="replace"),
)  # fmt: skip
def test_invalid_requests_are_refused(service: Service, body: bytes) -> None:
    status, reply = service.call("POST", "/v1/adapters", body)
    assert 400 <= status < 500, reply
    assert reply["error"]["type"] == "invalid_request_error"
