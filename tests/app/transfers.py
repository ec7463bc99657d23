"""Runs whole transfers for tests, and holds the files they should bring."""

import asyncio
import io
import json
import tarfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from app.fetch import parse_source
from app.fetch.imports import Import, Imports
from tests.app.fetch.servers import CONFIG, WEIGHTS

FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
LOOPBACK = ("127.0.0.0/8",)
ALLOWED = ("hf://org/", "s3://lent/adapters/")


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


async def read(folder: Path, _resolved: str) -> dict[str, Any]:
    """Return the files of a folder, in place of publishing them."""
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
    """Run an import to its end, and check that it leaves no files."""

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
