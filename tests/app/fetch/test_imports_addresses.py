"""Addresses and redirects that a transfer may follow, and the headers it sends there."""

from pathlib import Path
from typing import Any

import pytest

from tests.app.fetch.servers import COMMIT, CONFIG, Hub, running_hub
from tests.app.transfers import FILES, bring, tar_gz


def test_a_private_address_is_refused_unless_allowed(hub: Hub, s3: Any, tmp_path: Path) -> None:
    for source in ("hf://org/repo", "s3://lent/adapters/doctor/"):
        one = bring(tmp_path, source, private=("127.0.0.2",))
        assert one.state == "failed"
        assert "127.0.0.1" in str(one.error)
        assert "XINGLIN_PRIVATE_NETWORKS" in str(one.error)
    assert hub.asked == []


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest", "http://127.0.0.1:1/", "http://[::1]:1/"]
)
def test_a_redirect_to_a_private_address_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    with running_hub("127.0.0.2") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.redirects[f"/org/repo/resolve/{COMMIT}/adapter_config.json"] = target
        one = bring(tmp_path, "hf://org/repo", private=("127.0.0.2",))
        assert "is not a public address" in str(one.error)
        hub.redirects["/x.zip"] = target
        one = bring(tmp_path, f"{hub.url}/x.zip", private=("127.0.0.2",), allowed=("http://",))
        assert "is not a public address" in str(one.error)


def test_a_token_does_not_follow_a_redirect_elsewhere(hub: Hub, tmp_path: Path) -> None:
    with running_hub("127.0.0.3") as other:
        other.pages["/config"] = CONFIG
        hub.redirects[f"/org/repo/resolve/{COMMIT}/adapter_config.json"] = f"{other.url}/config?signature=x"
        assert bring(tmp_path, "hf://org/repo").result == FILES
        assert [headers.get("authorization") for _, headers in other.asked] == [None]


def test_an_archive_from_a_web_server(hub: Hub, tmp_path: Path) -> None:
    hub.pages["/models/x.tar.gz"] = tar_gz(FILES)
    allowed = (f"{hub.url}/models/",)
    hub.cuts = 1
    assert bring(tmp_path, f"{hub.url}/models/x.tar.gz", allowed=allowed).result == FILES
    hub.redirects["/models/y.zip"] = "/models/x.tar.gz?signature=abc"
    assert bring(tmp_path, f"{hub.url}/models/y.zip", allowed=allowed).result == FILES
    for target in (
        "/elsewhere/x.tar.gz",
        "http://localhost/models/x.tar.gz?key=secret",
        "file:///etc/passwd",
    ):
        hub.redirects["/models/y.zip"] = target
        one = bring(tmp_path, f"{hub.url}/models/y.zip", allowed=allowed)
        assert one.state == "failed"
        assert "secret" not in str(one.error)
    hub.pages["/models/bad.zip"] = b"no archive"
    assert bring(tmp_path, f"{hub.url}/models/bad.zip", allowed=allowed).problems
    assert "no such file" in str(bring(tmp_path, f"{hub.url}/models/none.zip", allowed=allowed).error)
    one = bring(tmp_path, f"{hub.url}/models/x.tar.gz", allowed=allowed, max_bytes=100)
    assert "XINGLIN_MAX_ADAPTER_GIB" in str(one.error)
