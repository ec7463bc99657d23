"""Imports from each kind of source, and the errors when they fail."""

from pathlib import Path
from typing import Any

import pytest

from app.errors import PathNotAllowed
from tests.app.fetch.servers import COMMIT, CONFIG, MOVED, WEIGHTS, Hub
from tests.app.transfers import FILES, bring

# Hugging Face


def test_a_branch_resolves_to_a_commit_and_only_adapter_files_are_downloaded(
    hub: Hub, tmp_path: Path
) -> None:
    hub.moves_after_info = True
    one = bring(tmp_path, "hf://org/repo@main")
    assert (one.state, one.error, one.result) == ("done", None, FILES)
    assert one.resolved == f"hf://org/repo@{COMMIT}"
    assert one.bytes_done == one.bytes_total == len(CONFIG) + len(WEIGHTS)
    assert {headers.get("authorization") for _, headers in hub.asked} == {"Bearer hf_secret"}
    assert bring(tmp_path, "hf://org/repo").resolved == f"hf://org/repo@{MOVED}"


def test_a_folder_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files[COMMIT] = {f"a/b/{name}": content for name, content in FILES.items()} | {"golden.jsonl": b"x"}
    one = bring(tmp_path, f"hf://org/repo@{COMMIT}/a/b")
    assert (one.result, one.resolved) == (FILES, f"hf://org/repo@{COMMIT}/a/b")


def test_pickled_weights_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    del hub.files[COMMIT]["adapter_model.safetensors"]
    one = bring(tmp_path, "hf://org/repo")
    assert one.state == "failed"
    assert "convert-adapter" in str(one.error)
    assert not any("resolve" in path for path, _ in hub.asked)


def test_a_missing_revision_or_adapter(hub: Hub, tmp_path: Path) -> None:
    assert "no such repository or revision" in str(bring(tmp_path, "hf://org/repo@none").error)
    hub.files[COMMIT] = {"README.md": b""}
    assert "holds no adapter" in str(bring(tmp_path, "hf://org/repo").error)


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_transfer_is_retried(hub: Hub, tmp_path: Path, resumes: bool) -> None:
    hub.resumes, hub.cuts, hub.failures = resumes, 1, 1
    one = bring(tmp_path, "hf://org/repo")
    assert (one.state, one.result) == ("done", FILES)
    assert one.bytes_done == one.bytes_total
    assert any("If-Range" in headers for _, headers in hub.asked)


@pytest.mark.parametrize("trouble", ["cuts", "failures"])
def test_a_transfer_fails_after_all_retries(hub: Hub, tmp_path: Path, trouble: str) -> None:
    hub.resumes = False
    setattr(hub, trouble, 100)
    one = bring(tmp_path, "hf://org/repo")
    assert one.state == "failed"
    assert "failed 4 times" in str(one.error)


def test_content_must_match_the_announced_digest_and_length(hub: Hub, tmp_path: Path) -> None:
    path = f"/org/repo/resolve/{COMMIT}/adapter_model.safetensors"
    hub.pages[path] = bytes(len(WEIGHTS))
    assert "the digest that the hub announced" in str(bring(tmp_path, "hf://org/repo").error)
    hub.pages[path] = WEIGHTS + b"more"
    assert "did not have the announced length" in str(bring(tmp_path, "hf://org/repo").error)


def test_too_large(hub: Hub, tmp_path: Path) -> None:
    one = bring(tmp_path, "hf://org/repo", max_bytes=1000)
    assert "XINGLIN_MAX_ADAPTER_GIB" in str(one.error)
    assert not any("resolve" in path for path, _ in hub.asked)


# S3


def test_a_folder_and_an_archive_from_s3(s3: Any, tmp_path: Path) -> None:
    one = bring(tmp_path, "s3://lent/adapters/doctor")
    assert (one.error, one.result, one.resolved) == (None, FILES, "s3://lent/adapters/doctor/")
    assert one.bytes_done == one.bytes_total == len(CONFIG) + len(WEIGHTS)
    one = bring(tmp_path, "s3://lent/adapters/x.tar.gz")
    assert (one.error, one.result) == (None, FILES)
    assert one.bytes_done == one.bytes_total


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://lent/adapters/none/", "no such"),
        ("s3://lent/adapters/none.zip", "no such"),
        ("s3://nowhere/adapters/x/", "no such"),
        ("s3://lent/adapters/pickled/", "convert-adapter"),
    ],
)
def test_missing_objects_in_s3(s3: Any, tmp_path: Path, source: str, message: str) -> None:
    one = bring(tmp_path, source, allowed=("s3://",))
    assert one.state == "failed"
    assert message in str(one.error)


def test_too_large_in_s3(s3: Any, tmp_path: Path) -> None:
    assert "XINGLIN_MAX" in str(bring(tmp_path, "s3://lent/adapters/doctor/", max_bytes=1000).error)
    assert "XINGLIN_MAX" in str(bring(tmp_path, "s3://lent/adapters/x.tar.gz", max_bytes=100).error)


def test_a_bucket_that_is_not_allowed(tmp_path: Path) -> None:
    with pytest.raises(PathNotAllowed):
        bring(tmp_path, "s3://other/adapters/doctor/")


def test_missing_credentials_are_reported(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_ACCESS_KEY_ID" in str(bring(tmp_path, "s3://lent/adapters/doctor/").error)


def test_gs_needs_another_package(tmp_path: Path) -> None:
    one = bring(tmp_path, "gs://bucket/x/", allowed=("gs://",))
    assert "pip install gcsfs" in str(one.error)
