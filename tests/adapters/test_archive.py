"""adapters/archive.py: archives as common tools make them, and hostile ones."""

import gzip
import io
import os
import random
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from adapters import InvalidAdapter, validate
from adapters.archive import unpack
from tests.adapters.archives import (
    FILES,
    KINDS,
    MAX_BYTES,
    header,
    kinds,
    moded,
    packed,
    patched,
    pax,
    problems_of,
    raw,
    tar,
    tgz,
    under,
    unpacked,
)
from tests.adapters.folders import BASE, Folder, safetensors


@kinds
@pytest.mark.parametrize("prefix", ["", "./", "result/", "./result/", "我的 adapter (2)/"])
def test_files_at_the_top_or_in_one_folder(tmp_path: Path, make: Callable[..., bytes], prefix: str) -> None:
    assert unpacked(tmp_path, make(*under(prefix))) == FILES


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("arcname", ["result", "."])
def test_folder_packed_by_tar(tmp_path: Path, adapter: Folder, form: int, arcname: str) -> None:
    made = io.BytesIO()
    source = adapter.write()
    with tarfile.open(fileobj=made, mode="w:gz", format=form) as archive:
        archive.add(source, arcname)
    (tmp_path / "in").mkdir()
    unpacked(tmp_path / "in", made.getvalue())
    validate(tmp_path / "in" / "folder", BASE)


def test_streamed_zip_with_folders_and_a_comment(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("result")
        for name, content in FILES.items():
            with archive.open(f"result/{name}", "w", force_zip64=True) as file:
                file.write(content)
        archive.comment = b"0123456789abcdef"
    assert unpacked(tmp_path, made.getvalue()) == FILES


@kinds
def test_macos_files_are_skipped(tmp_path: Path, make: Callable[..., bytes]) -> None:
    added = ["__MACOSX/result/._adapter_config.json", "result/._adapter_config.json", "result/.DS_Store"]
    assert unpacked(tmp_path, make(*under("result/"), *((name, b"x") for name in added))) == FILES


def test_git_header_is_skipped(tmp_path: Path) -> None:
    content = pax(b"18 comment=abcdef\n", tarfile.XGLTYPE) + tar(*under("name-main/"))
    assert unpacked(tmp_path, gzip.compress(content)) == FILES


@kinds
def test_mode_owner_and_time_are_not_kept(tmp_path: Path, make: Callable[..., bytes]) -> None:
    member: object = "a.json"
    if make in (tgz, tar):
        member = header(tarfile.REGTYPE, "a.json", mode=0o6777, mtime=1, uid=12, uname="root")
    elif make is packed:
        member = moded("a.json", stat.S_IFREG | 0o6777)
    unpacked(tmp_path, make((member, b"x")))
    found = (tmp_path / "folder" / "a.json").stat()
    assert stat.S_IMODE(found.st_mode) & ~0o600 == 0
    assert (found.st_uid, found.st_mtime > 1e9) == (os.getuid(), True)


NAMES = [
    "../x", "a/../../x", "a/../x", "..", "/etc/x", "//x", "a\\..\\x", "..\\x", "C:\\x", "C:x", "C:/x", "a//x",
    "a\nb", "a\rb", "\x1b[31m", "a\u202egnp.exe", "a\u200bb", "-rf", "a b", "x" * 300, "é.json",
    "x" * 300 + "/a.json", "a\u202e/a.json", "~", "a.json ", "a\x7f", "NUL:", "./../x", "././x", "a/./x",
]  # fmt: skip


@kinds
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_path_traversal_and_deceptive_names(tmp_path: Path, make: Callable[..., bytes], name: str) -> None:
    [problem, *_] = problems_of(tmp_path, make((name, b"x")))
    assert (
        "file names may have letters" in problem
        or "files in deeper folders" in problem
        or problem.startswith("the arch")
    )


@pytest.mark.parametrize(
    "content",
    [
        tar(("", b"x")),
        tar(("\udcff", b"x")),
        tar(("\udcff" * 200, b"x")),
        pax(b"16 path=a.json\0\n") + tar(("b.json", b"x")),
        pax(b"14 path=\xed\xa0\x80\n"[:-1] + b"\n") + tar(("b.json", b"x")),
        packed(("a?b.json", b"x")).replace(b"a?b", b"a\0b"),
        packed(("é.json", b"x")).replace("é".encode(), b"\xed\xa0"),
        raw(header(tarfile.GNUTYPE_LONGNAME, size=7), b"../../x") + tar(("b.json", b"x")),
    ],
)
def test_names_that_are_not_text(tmp_path: Path, content: bytes) -> None:
    problems_of(tmp_path, content)


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes, form: int) -> None:
    link = header(kind, "adapter_config.json", linkname="/etc/passwd" + "x" * 200)
    [problem] = problems_of(tmp_path, tar((link, b""), ("adapter_config.json", b"{}"), form=form))
    assert "links or special files: 'adapter_config.json'" in problem


@pytest.mark.parametrize(
    "kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFDIR]
)
def test_links_and_devices_in_a_zip(tmp_path: Path, kind: int) -> None:
    [problem] = problems_of(tmp_path, packed((moded("a.json", kind | 0o777), b"/etc/passwd"), ("b", b"x")))
    assert "links or special files: 'a.json'" in problem


SPARSE = {
    "gnu": raw(header(tarfile.GNUTYPE_SPARSE, "a.json", size=1), b"x") + bytes(1024),
    "pax 0": pax(b"22 GNU.sparse.size=10\n") + tar(("a.json", b"x")),
    "pax 1": pax(b"22 GNU.sparse.major=1\n") + tar(("GNUSparseFile.0/a", b"x")),
    "unknown": raw(header(b"Z", "a.json", size=1), b"x") + bytes(1024),
    "a folder with content": raw(header(tarfile.DIRTYPE, "a", size=1), b"x") + bytes(1024),
}


@pytest.mark.parametrize("content", SPARSE.values(), ids=SPARSE)
def test_sparse_files_and_unknown_types(tmp_path: Path, content: bytes) -> None:
    assert re.search("sparse|special", problems_of(tmp_path, content)[0])


def test_encrypted_zip(tmp_path: Path) -> None:
    content = packed(("a.json", b"x"))
    content = patched(content, b"PK\1\2", 8, b"\1")
    assert "without a password; encrypted files: 'a.json'" in problems_of(tmp_path, content)[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_with_another_compression_method(tmp_path: Path, method: int) -> None:
    assert "with deflate" in problems_of(tmp_path, packed(("a.json", b"x"), method=method))[0]


@kinds
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json", "a.json"], "file names must be unique"),
        (["a.json", "A.JSON"], "file names must be unique"),
        (["a.json", "result/a.json"], "file names must be unique"),
        (["a.json", "./a.json"], "file names must be unique"),
        (["a.json", "result/b.json"], "a folder beside the files"),
        (["one/a.json", "two/b.json"], "several folders"),
        (["result/", "a.json"], "a folder beside the files"),
        (["result/deep/a.json"], "files in deeper folders: 'result/deep/a.json'"),
        (["result/deep/"], "files in deeper folders"),
        (["result/"], "holds no files"),
        ([".DS_Store"], "holds no files"),
        ([], "holds no files"),
        ([f"{number}.json" for number in range(65)], "more than 64 files"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_file_layout(tmp_path: Path, make: Callable[..., bytes], names: Iterable[str], message: str) -> None:
    is_zip = make(("x", b"")).startswith(b"PK")
    members = [
        (header(tarfile.DIRTYPE, name), b"") if name.endswith("/") and not is_zip else (name, b"")
        for name in names
    ]
    assert any(message in problem for problem in problems_of(tmp_path, make(*members)))


@kinds
def test_all_problems_at_once(tmp_path: Path, make: Callable[..., bytes]) -> None:
    names = ["../a", "one/two/b", "c.json", "C.json", "two/d", *(f"bad {number}" for number in range(8))]
    problems = problems_of(tmp_path, make(*((name, b"x" * 3000) for name in names)))
    assert len(problems) == 4
    assert "and 4 more" in problems[0]


@kinds
def test_truncated_archive(tmp_path: Path, make: Callable[..., bytes]) -> None:
    content = make(*under("result/"))
    last = len(content.rstrip(b"\0")) if make in (tar, KINDS["gnu tar"]) else len(content)
    for length in {*range(0, last, 97), *range(60), last - 1}:
        problems_of(tmp_path, content[:length])


@kinds
@pytest.mark.parametrize(
    "more", [b"x", b"garbage" * 1000, b"\0" * (2 << 20), None], ids=["x", "more", "zeros", "twice"]
)
def test_bytes_after_the_end(tmp_path: Path, make: Callable[..., bytes], more: bytes | None) -> None:
    content = make(*FILES.items())
    problems_of(tmp_path, content + (content + b"x" if more is None else more))


def test_several_gzip_members(tmp_path: Path) -> None:
    content = tar(*FILES.items())
    for at in (0, 512, 3000, len(content)):
        joined = gzip.compress(content[:at]) + gzip.compress(content[at:])
        assert "bytes follow the end" in problems_of(tmp_path, joined)[0]
    assert problems_of(tmp_path, gzip.compress(b"") * 100_000)


NO_ARCHIVES = {
    "empty": b"",
    "text": b"hello\n" * 1000,
    "safetensors": safetensors({}) + bytes(2000),
    "pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0cos\nsystem\n.",
    "bzip2": b"BZh91AY&SY" + b"x" * 1000,
    "xz": b"\xfd7zXZ\0" + b"x" * 1000,
    "gzip of text": gzip.compress(b"hello\n" * 1000),
    "gzip of nothing": gzip.compress(b""),
}


@pytest.mark.parametrize("content", NO_ARCHIVES.values(), ids=NO_ARCHIVES)
def test_unsupported_archives(tmp_path: Path, content: bytes) -> None:
    assert problems_of(tmp_path, content) == [
        "unsupported archive: send a .tar.gz, .tgz, .tar or .zip of one adapter's files"
    ]


def test_existing_files_are_not_replaced_and_links_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        unpacked(tmp_path, tgz(("a", b"x"), ("b", b"x")))
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert not (tmp_path / "elsewhere").exists()


@kinds
def test_random_corruption_is_refused_or_read(tmp_path: Path, make: Callable[..., bytes]) -> None:
    chance = random.Random(0)
    whole = make(*under("result/"))
    archive, folder = tmp_path / "upload", tmp_path / "folder"
    folder.mkdir()
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        archive.unlink(missing_ok=True)
        archive.write_bytes(content)
        try:
            unpack(archive, folder, max_bytes=MAX_BYTES)
        except InvalidAdapter:
            refused += 1
        else:
            assert len(list(folder.iterdir())) == 2
            for path in folder.iterdir():
                path.unlink()
        assert list(folder.iterdir()) == []
    assert refused
