"""Whole transfers: the service's side, the process, and servers that do what servers do."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters import InvalidAdapter
from app.errors import AdapterRefused, BadRequest, ModelNotFound, PathNotAllowed
from app.fetch import parse_source
from app.imports import Import, Imports
from tests.app.fetch.servers import COMMIT, CONFIG, MOVED, WEIGHTS, Hub, running_hub

FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
LOOPBACK = ("127.0.0.0/8",)
ALLOWED = ("hf://org/", "s3://lent/adapters/")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    import boto3  # noqa: PLC0415
    from moto.server import ThreadedMotoServer  # noqa: PLC0415

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="lent")
        for name, content in FILES.items():
            client.put_object(Bucket="lent", Key=f"adapters/doctor/{name}", Body=content)
        client.put_object(Bucket="lent", Key="adapters/doctor/optimizer.pt", Body=b"x" * 10)
        client.put_object(Bucket="lent", Key="adapters/doctor/deep/golden.jsonl", Body=b"x")
        client.put_object(Bucket="lent", Key="adapters/pickled/adapter_config.json", Body=CONFIG)
        client.put_object(Bucket="lent", Key="adapters/pickled/adapter_model.bin", Body=b"x")
        client.put_object(Bucket="lent", Key="adapters/x.tar.gz", Body=tar_gz(FILES))
        yield client
        client.close()
    server.stop()


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def read(folder: Path, _resolved: str) -> dict[str, Any]:
    """What stands for publishing: the files, as they are when it is called."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}  # noqa: ASYNC240


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


def left(data_dir: Path) -> list[str]:
    return [path.name for path in (data_dir / "imports").iterdir() if path.name != ".lock"]


def bring(
    data_dir: Path,
    source: str,
    *,
    then: Callable[[Path, str], Awaitable[dict[str, Any]]] = read,
    allowed: Sequence[str] = ALLOWED,
    private: Sequence[str] = LOOPBACK,
    max_bytes: int = 1 << 20,
) -> Import:
    """Import to the end; whatever it is, nothing may be left."""

    async def whole() -> Import:
        imports = Imports(data_dir, allowed=allowed, private_networks=private, max_bytes=max_bytes)
        one = imports.start(parse_source(source, allowed), then)
        await until(lambda: one.finished_at is not None)
        await imports.close()
        return one

    one = asyncio.run(whole())
    assert left(data_dir) == []
    json.dumps({**one.shown(), "result": None})
    return one


# Hugging Face


def test_a_branch_becomes_a_commit_and_only_what_an_adapter_needs_comes(hub: Hub, tmp_path: Path) -> None:
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


def test_a_revision_or_adapter_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    assert "no such repository or revision" in str(bring(tmp_path, "hf://org/repo@none").error)
    hub.files[COMMIT] = {"README.md": b""}
    assert "holds no adapter" in str(bring(tmp_path, "hf://org/repo").error)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_transfer_is_mended(hub: Hub, tmp_path: Path, resumes: bool) -> None:
    hub.resumes, hub.cuts, hub.failures = resumes, 1, 1
    one = bring(tmp_path, "hf://org/repo")
    assert (one.state, one.result) == ("done", FILES)
    assert one.bytes_done == one.bytes_total
    assert any("If-Range" in headers for _, headers in hub.asked)


@pytest.mark.parametrize("trouble", ["cuts", "failures"])
def test_a_transfer_that_breaks_every_time_fails(hub: Hub, tmp_path: Path, trouble: str) -> None:
    hub.resumes = False
    setattr(hub, trouble, 100)
    one = bring(tmp_path, "hf://org/repo")
    assert one.state == "failed"
    assert "broke off 4 times" in str(one.error)


def test_content_that_is_not_what_was_announced(hub: Hub, tmp_path: Path) -> None:
    path = f"/org/repo/resolve/{COMMIT}/adapter_model.safetensors"
    hub.pages[path] = bytes(len(WEIGHTS))
    assert "not what the hub announced" in str(bring(tmp_path, "hf://org/repo").error)
    hub.pages[path] = WEIGHTS + b"more"
    assert "not as long as announced" in str(bring(tmp_path, "hf://org/repo").error)


def test_too_large(hub: Hub, tmp_path: Path) -> None:
    one = bring(tmp_path, "hf://org/repo", max_bytes=1000)
    assert "XINGLIN_MAX_ADAPTER_GIB" in str(one.error)
    assert not any("resolve" in path for path, _ in hub.asked)


# Addresses and redirects


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
def test_what_is_not_there_in_s3(s3: Any, tmp_path: Path, source: str, message: str) -> None:
    one = bring(tmp_path, source, allowed=("s3://",))
    assert one.state == "failed"
    assert message in str(one.error)


def test_too_large_in_s3(s3: Any, tmp_path: Path) -> None:
    assert "XINGLIN_MAX" in str(bring(tmp_path, "s3://lent/adapters/doctor/", max_bytes=1000).error)
    assert "XINGLIN_MAX" in str(bring(tmp_path, "s3://lent/adapters/x.tar.gz", max_bytes=100).error)


def test_a_bucket_that_is_not_listed(tmp_path: Path) -> None:
    with pytest.raises(PathNotAllowed):
        bring(tmp_path, "s3://other/adapters/doctor/")


def test_without_credentials_the_reason_is_said(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_ACCESS_KEY_ID" in str(bring(tmp_path, "s3://lent/adapters/doctor/").error)


def test_google_needs_one_more_package(tmp_path: Path) -> None:
    one = bring(tmp_path, "gs://bucket/x/", allowed=("gs://",))
    assert "pip install gcsfs" in str(one.error)


# The service's side


def test_progress_waiting_and_cancel(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_between_pieces = 0.25

    async def whole() -> None:
        imports = Imports(tmp_path, allowed=ALLOWED, private_networks=LOOPBACK, max_bytes=1 << 20)
        source = parse_source("hf://org/repo", ALLOWED)
        first, second, third = (imports.start(source, read) for _ in range(3))
        await until(lambda: first.bytes_done > len(CONFIG) and second.bytes_done > len(CONFIG))
        assert first.bytes_total == len(CONFIG) + len(WEIGHTS)
        assert [one.state for one in imports.list()] == ["waiting", "fetching", "fetching"]
        started = time.monotonic()
        await imports.cancel(second.id)
        await imports.cancel(third.id)
        assert time.monotonic() < started + 1
        assert (second.state, third.state, len(left(tmp_path))) == ("cancelled", "cancelled", 1)
        await imports.cancel(second.id)
        at_once = imports.start(source, read)
        await imports.cancel(at_once.id)
        assert at_once.state == "cancelled"
        with pytest.raises(ModelNotFound):
            imports.get("none")
        await imports.close()
        assert (first.state, left(tmp_path)) == ("cancelled", [])

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InvalidAdapter(["one", "two"]), "one; two"),
        (AdapterRefused("not proven"), "not proven"),
        (OSError("/host/path"), "the service failed on this; its log says why"),
    ],
)
def test_an_error_of_publishing(hub: Hub, tmp_path: Path, error: Exception, message: str) -> None:
    async def fail(folder: Path, resolved: str) -> dict[str, Any]:
        raise error

    one = bring(tmp_path, "hf://org/repo", then=fail)
    assert (one.state, one.error, one.problems) == ("failed", message, getattr(error, "problems", []))


def test_what_is_being_published_is_not_cancelled(hub: Hub, tmp_path: Path) -> None:
    async def whole() -> None:
        goes_on = asyncio.Event()

        async def then(folder: Path, resolved: str) -> dict[str, Any]:
            await goes_on.wait()
            return {}

        imports = Imports(tmp_path, allowed=ALLOWED, private_networks=LOOPBACK, max_bytes=1 << 20)
        one = imports.start(parse_source("hf://org/repo", ALLOWED), then)
        await until(lambda: one.state == "publishing")
        with pytest.raises(BadRequest):
            await imports.cancel(one.id)
        goes_on.set()
        await until(lambda: one.finished_at is not None)
        assert one.state == "done"
        await imports.close()

    asyncio.run(whole())


def test_uploads(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(tar_gz(FILES))
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("../evil", b"x")

    async def whole() -> None:
        imports = Imports(tmp_path, allowed=(), private_networks=(), max_bytes=1 << 20)
        async with imports.unpack_upload(good) as folder:
            assert await read(folder, "") == FILES
        assert left(tmp_path) == []
        with pytest.raises(InvalidAdapter) as caught:
            async with imports.unpack_upload(bad):
                pass
        assert caught.value.problems
        assert left(tmp_path) == []
        await imports.close()

    asyncio.run(whole())


SERVICE = """
import asyncio, sys
from pathlib import Path
from app.fetch import parse_source
from app.imports import Imports

async def then(folder, resolved): return {}

async def main():
    imports = Imports(Path(sys.argv[1]), allowed=["hf://"], private_networks=["127.0.0.1"], max_bytes=1 << 20)
    one = imports.start(parse_source("hf://org/repo", ["hf://"]), then)
    while one.bytes_done < 1000: await asyncio.sleep(0.02)
    children = Path("/proc/self/task").glob("*/children")
    print("under way", *[pid for path in children for pid in path.read_text().split()], flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_killed_service_leaves_no_transfer_behind(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_between_pieces = 0.25
    process = subprocess.Popen([sys.executable, "-c", SERVICE, tmp_path], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        *_, child = process.stdout.readline().split()
        assert Path(f"/proc/{child}").exists()
        other = Imports(tmp_path, allowed=(), private_networks=(), max_bytes=1)
        assert len(left(tmp_path)) == 1  # it belongs to a service that lives
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 2
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert left(tmp_path) == []
        asyncio.run(other.close())


def test_what_a_former_life_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "imports" / "old" / "adapter").mkdir(parents=True)
    (tmp_path / "imports" / "upload").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "imports" / "link").symlink_to(tmp_path / "outside")
    asyncio.run(Imports(tmp_path, allowed=(), private_networks=(), max_bytes=1).close())
    assert left(tmp_path) == []
    assert (tmp_path / "outside").exists()


def test_a_wrong_setting_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="XINGLIN_SOURCES"):
        Imports(tmp_path, allowed=["nonsense"], private_networks=(), max_bytes=1)
    with pytest.raises(ValueError, match="10"):
        Imports(tmp_path, allowed=(), private_networks=["10.0.0.0.0"], max_bytes=1)
