"""The service's side of a transfer: progress, end and cleanup."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from adapters import InvalidAdapter
from app.errors import AdapterRefused, BadRequest, ImportNotFound
from app.fetch import parse_source
from app.fetch.imports import Imports
from tests.app.fetch.servers import CONFIG, WEIGHTS, Hub
from tests.app.transfers import ALLOWED, FILES, LOOPBACK, bring, left, read, tar_gz, until


def test_progress_waiting_and_cancel(hub: Hub, tmp_path: Path) -> None:
    hub.seconds_between_pieces = 0.25

    async def whole() -> None:
        imports = Imports(tmp_path, allowed=ALLOWED, private_networks=LOOPBACK, max_bytes=1 << 20)
        source = parse_source("hf://org/repo", ALLOWED)
        first, second, third = (imports.start(source, read) for _ in range(3))
        await until(lambda: first.bytes_done > len(CONFIG) and second.bytes_done > len(CONFIG))
        assert first.bytes_total == len(CONFIG) + len(WEIGHTS)
        assert [one.state for one in imports.list()] == ["waiting", "fetching", "fetching"]
        await imports.cancel(second.id)
        await imports.cancel(third.id)
        assert (second.state, third.state, len(left(tmp_path))) == ("cancelled", "cancelled", 1)
        await imports.cancel(second.id)
        at_once = imports.start(source, read)
        await imports.cancel(at_once.id)
        assert at_once.state == "cancelled"
        with pytest.raises(ImportNotFound):
            imports.get("none")
        await imports.close()
        assert (first.state, left(tmp_path)) == ("cancelled", [])

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InvalidAdapter(["one", "two"]), "one; two"),
        (AdapterRefused("not proven"), "not proven"),
        (OSError("/host/path"), "internal error: see the service's log"),
    ],
)
def test_an_error_of_publishing(hub: Hub, tmp_path: Path, error: Exception, message: str) -> None:
    async def fail(folder: Path, resolved: str) -> dict[str, Any]:
        raise error

    one = bring(tmp_path, "hf://org/repo", then=fail)
    assert (one.state, one.error, one.problems) == ("failed", message, getattr(error, "problems", []))


def test_an_import_cannot_be_cancelled_while_it_is_published(hub: Hub, tmp_path: Path) -> None:
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
import asyncio, os, sys
from pathlib import Path
from app.fetch import parse_source
from app.fetch.imports import Imports
from tests.processes import descendants

async def then(folder, resolved): return {}

async def main():
    imports = Imports(Path(sys.argv[1]), allowed=["hf://"], private_networks=["127.0.0.1"], max_bytes=1 << 20)
    one = imports.start(parse_source("hf://org/repo", ["hf://"]), then)
    while one.bytes_done < 1000: await asyncio.sleep(0.02)
    print("under way", *descendants(os.getpid()), flush=True)
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
        assert len(left(tmp_path)) == 1  # it belongs to a running service
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 60
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert left(tmp_path) == []
        asyncio.run(other.close())


def test_files_of_a_killed_service_are_removed(tmp_path: Path) -> None:
    (tmp_path / "imports" / "old" / "adapter").mkdir(parents=True)
    (tmp_path / "imports" / "upload").write_bytes(b"x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "imports" / "link").symlink_to(tmp_path / "outside")
    asyncio.run(Imports(tmp_path, allowed=(), private_networks=(), max_bytes=1).close())
    assert left(tmp_path) == []
    assert (tmp_path / "outside").exists()


def test_wrong_settings_are_rejected_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="XINGLIN_SOURCES"):
        Imports(tmp_path, allowed=["nonsense"], private_networks=(), max_bytes=1)
    with pytest.raises(ValueError, match="10"):
        Imports(tmp_path, allowed=(), private_networks=["10.0.0.0.0"], max_bytes=1)


@pytest.mark.parametrize(
    ("end", "told", "logged"),
    [
        (
            "echo no module named app.fetch >&2; exit 3",
            "failed with exit code 3",
            "no module named app.fetch",
        ),
        ("echo out of memory >&2; kill -9 $$", "was killed by signal 9: retry", "out of memory"),
    ],
)
def test_a_failed_process_and_a_killed_one_are_reported_differently(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    end: str,
    told: str,
    logged: str,
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nread job\n{end}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))

    async def fetch() -> str | None:
        imports = Imports(tmp_path / "data", allowed=ALLOWED, private_networks=LOOPBACK, max_bytes=1 << 20)
        one = imports.start(parse_source("hf://org/repo", ALLOWED), read)
        await until(lambda: one.state == "failed")
        await imports.close()
        return one.error

    error = asyncio.run(fetch())
    assert error is not None
    assert told in error
    assert logged in caplog.text
    assert logged not in error
