"""adapters/archive.py: archives with false headers, and archives that unpack to far more than their size."""

import gzip
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters import InvalidAdapter
from adapters.archive import unpack
from tests.adapters.archives import header, kinds, packed, patched, pax, problems_of, raw, tar, tgz, unpacked


def test_64_files_are_allowed(tmp_path: Path) -> None:
    members = [(header(tarfile.DIRTYPE, "r"), b""), *((f"r/{number}", b"x") for number in range(63))]
    assert len(unpacked(tmp_path, tgz(*members))) == 63


@kinds
def test_total_size_is_limited(tmp_path: Path, make: Callable[..., bytes]) -> None:
    content = make(("a", bytes(600)), ("b", bytes(400)))
    assert sum(map(len, unpacked(tmp_path, content, 1000).values())) == 1000
    for path in (tmp_path / "folder").iterdir():
        path.unlink()
    assert problems_of(tmp_path, content, 999) == ["the archive unpacks to more than the 999 bytes allowed"]


def test_100_000_members_are_not_read(tmp_path: Path) -> None:
    one = raw(header(tarfile.REGTYPE, "a"))
    bomb = zlib.compressobj(1, zlib.DEFLATED, 31)
    tarred = b"".join(bomb.compress(one * 1000) for _ in range(100)) + bomb.flush()
    zipped = packed(("a", b"")).partition(b"PK\1\2")
    entry = b"PK\1\2" + zipped[2].partition(b"PK\5\6")[0]
    end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, 100_000 & 0xFFFF, 100_000 & 0xFFFF, len(entry) * 100_000, 31, 0
    )
    for content in (tarred, one * 100_000, zipped[0] + entry * 100_000 + end):
        started = time.process_time()
        assert "more than 64 files" in problems_of(tmp_path, content)[-1]
        assert time.process_time() - started < 1


def zeros(size: int, window: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def bombs() -> dict[str, bytes]:
    large = 100 << 20
    honest = packed(("a.json", b"x"))
    deflated = zeros(large, -15)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(deflated), 100, 1, 0) + b"a"
    directory = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(deflated), 100, 1, 0, 0, 0, 0, 0, 0
    )
    start = len(local) + len(deflated)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory) + 1, start, 0)
    return {
        "zip that is honest": packed(("a.json", bytes(large))),
        "zip that says 100 bytes": local + deflated + directory + b"a" + end,
        "zip that says too little": patched(honest, b"PK\1\2", 24, b"\0"),
        "zip that says too much": patched(honest, b"PK\1\2", 24, b"\2"),
        "zip that says 4 GiB": patched(honest, b"PK\1\2", 24, b"\xfe\xff\xff\xff"),
        "zip packed in more": patched(honest, b"PK\1\2", 20, b"\xfe\xff\xff\xff"),
        "zip packed in less": patched(honest, b"PK\1\2", 20, b"\1"),
        "zip of another checksum": patched(honest, b"PK\1\2", 16, b"\0\0\0\0"),
        "gzip of zeros": zeros(large, 31),
        "tgz with a large member": gzip.compress(
            raw(header(tarfile.REGTYPE, "a", size=large)) + bytes(large), 1
        ),
        "tgz of 8 EiB": gzip.compress(raw(header(tarfile.REGTYPE, "a", size=(1 << 63) - 1))),
        "tar of a size below 0": raw(header(tarfile.REGTYPE, "a", size=-512)) + bytes(1024),
        "pax header of 8 GiB": gzip.compress(raw(header(tarfile.XHDTYPE, size=8 << 30)) + bytes(large), 1),
        "long name of 100 MiB": gzip.compress(
            raw(header(tarfile.GNUTYPE_LONGNAME, size=large)) + bytes(large), 1
        ),
        "long link of 8 GiB": raw(header(tarfile.GNUTYPE_LONGLINK, size=8 << 30)),
        "global header of 8 GiB": raw(header(tarfile.XGLTYPE, size=8 << 30)),
        "global header with a name": pax(b"10 path=a\n", tarfile.XGLTYPE) + tar(("b", b"x")),
        "pax size of 8 EiB": pax(b"28 size=9223372036854775807\n") + tar(("a", b"x")),
        "pax size of 999 digits": pax(b"1010 size=" + b"9" * 999 + b"\n") + tar(("a", b"x")),
        "pax size below 0": pax(b"11 size=-1\n") + tar(("a", b"x")),
        "pax record of no length": pax(b"0 path=a\n") + tar(("a", b"x")),
        "pax record beyond its header": pax(b"99999 path=a\n") + tar(("a", b"x")),
        "pax record without a key": pax(b"abcdefghijklmnop") + tar(("a", b"x")),
        "1000 pax headers": pax(b"10 path=a\n") * 1000 + tar(("a", b"x")),
    }


BOMBS = bombs()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_and_lies(tmp_path: Path, name: str) -> None:
    archive, folder = tmp_path / "upload", tmp_path / "folder"
    archive.write_bytes(BOMBS[name])
    folder.mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidAdapter):
            unpack(archive, folder, max_bytes=10 << 20)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()
    assert list(folder.iterdir()) == []


def test_large_files_are_streamed(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(1 << 20) * 40
    (tmp_path / "upload").write_bytes(packed(("a", content)))
    (tmp_path / "folder").mkdir()
    tracemalloc.start()
    try:
        unpack(tmp_path / "upload", tmp_path / "folder", max_bytes=len(content))
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "folder" / "a").read_bytes() == content


def test_files_of_a_zip_may_not_overlap(tmp_path: Path) -> None:
    """Overlapping members are how a non-recursive zip bomb works."""
    content = packed(("a", b"x" * 100), ("b", b"x" * 100), method=zipfile.ZIP_STORED)
    second = content.rindex(b"PK\1\2")
    both_at_0 = content[: second + 42] + bytes(4) + content[second + 46 :]
    assert "overlap" in problems_of(tmp_path, both_at_0)[0]
    longer = patched(content, b"PK\1\2", 20, struct.pack("<LL", 131, 131))
    assert "overlap" in problems_of(tmp_path, longer)[0]
    into_directory = content[: second + 20] + struct.pack("<LL", 150, 150) + content[second + 28 :]
    assert "overlap" in problems_of(tmp_path, into_directory)[0]


@pytest.mark.parametrize("field", range(6))
@pytest.mark.parametrize("value", [0, 1, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_zip64_lies(tmp_path: Path, field: int, value: int) -> None:
    """False sizes and offset of a member, and false count, size and offset of the directory."""
    wide = [1, 1, 0, 1, 0, 0]
    entry_name = b"a.json"
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, zlib.crc32(b"x"), 1, 1, len(entry_name), 0)
    local += entry_name + b"x"
    directory_bytes = 46 + len(entry_name) + 28
    wide[4], wide[5] = directory_bytes, len(local)
    honest = list(wide)
    wide[field] = value
    extra = struct.pack("<HHQQQ", 1, 24, *wide[:3])
    directory = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, zlib.crc32(b"x"), 0xFFFFFFFF, 0xFFFFFFFF, len(entry_name),
        len(extra), 0, 0, 0, 0, 0xFFFFFFFF,
    )  # fmt: skip
    directory += entry_name + extra
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, wide[3], *wide[3:])
    end64 += struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    content = local + directory + end64 + end
    if wide == honest or field == 3:  # members are counted; the stated count is not used
        assert unpacked(tmp_path, content) == {"a.json": b"x"}
    else:
        problems_of(tmp_path, content)
