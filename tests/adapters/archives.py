"""Archives built by hand, so that tests can corrupt any part."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import InvalidAdapter
from adapters.archive import unpack

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 20}
MAX_BYTES = 1 << 20


def tar(*members: tuple[str | tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar with these members, given by name or header."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form, errors="surrogateescape") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def tgz(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    return gzip.compress(tar(*members), mtime=0)


def packed(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip with these members, given by name or entry."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in members:
            entry = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            archive.writestr(entry, content, method)
    return made.getvalue()


def header(kind: bytes, name: str = "x", **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def moded(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def raw(info: tarfile.TarInfo, content: bytes = b"") -> bytes:
    """Return one header and its padded content, without an end of archive."""
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return raw(header(kind, size=len(records)), records)


def patched(content: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    """Return a zip with bytes changed at `offset` after the start of the first `signature`."""
    at = content.index(signature) + offset
    return content[:at] + value + content[at + len(value) :]


KINDS: dict[str, Callable[..., bytes]] = {
    "tar.gz": tgz,
    "tar": tar,
    "gnu tar": lambda *members: tar(*members, form=tarfile.GNU_FORMAT),
    "zip": packed,
    "stored zip": lambda *members: packed(*members, method=zipfile.ZIP_STORED),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def unpacked(tmp_path: Path, content: bytes, max_bytes: int = MAX_BYTES) -> dict[str, bytes]:
    archive, folder = tmp_path / "upload", tmp_path / "folder"
    archive.write_bytes(content)
    folder.mkdir(exist_ok=True)
    unpack(archive, folder, max_bytes=max_bytes)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def problems_of(tmp_path: Path, content: bytes, max_bytes: int = MAX_BYTES) -> list[str]:
    """Return the problems of an archive; assert that no file of it is left."""
    with pytest.raises(InvalidAdapter) as caught:
        unpacked(tmp_path, content, max_bytes)
    assert list((tmp_path / "folder").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "upload"}
    assert caught.value.problems
    assert all(problem.isprintable() and len(problem) < 1000 for problem in caught.value.problems)
    assert str(tmp_path) not in str(caught.value)
    return caught.value.problems


def under(prefix: str) -> list[tuple[str, bytes]]:
    return [(prefix + name, content) for name, content in FILES.items()]
