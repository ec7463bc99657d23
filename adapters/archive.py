"""Unpack an untrusted archive into an empty folder: regular files only, or all problems at once.

Reads are bounded: members, headers and bytes are counted, content is streamed in pieces, and reading stops at the
first error after which the rest cannot be trusted.
"""

import io
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from adapters.errors import InvalidAdapter, shown

_MAX_MEMBERS = 64
_MAX_HEADERS = 4 * _MAX_MEMBERS  # a tar also has extension headers
_MAX_HEADER_BYTES = 64 << 10
_MAX_PADDING_BYTES = 1 << 20  # tar pads its last record with zeros
_PIECE_BYTES = 1 << 20
_BLOCK_BYTES = 512
_FILE_NAME = re.compile(r"\.?[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_END_OF_ZIP = struct.Struct("<4s16xH")  # signature, length of the comment
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field

_NO_ARCHIVE = "unsupported archive: send a .tar.gz, .tgz, .tar or .zip of one adapter's files"
_TOO_MANY = f"the archive has more than {_MAX_MEMBERS} files: pack only the adapter"
_CUT_SHORT = "the archive is truncated: send it again"
_DAMAGED = "the archive is damaged: pack and send it again"
_TRAILING = "extra bytes follow the end of the archive: pack only the adapter"
_SPECIAL = "only regular files are allowed; links or special files: "
_ENCRYPTED = "pack the adapter without a password; encrypted files: "
_METHOD = "pack the adapter with deflate, zip's default; files with another compression method: "
_NAMES = "file names may have letters, digits, '.', '_' and '-', at most 100 characters; invalid names: "
_NESTED = "files must be at the top of the archive or in one folder; files in deeper folders: "
_TWICE = "file names must be unique, ignoring case; duplicates: "


class _Unreadable(Exception):
    """An error after which reading on is not safe."""


@dataclass(frozen=True)
class _Member:
    """One entry. `content` yields exactly `size` bytes in pieces, or raises _Unreadable."""

    name: str
    size: int
    content: Iterator[bytes]
    is_folder: bool = False
    refused: str | None = None
    """Why it cannot be unpacked; independent of its name."""


class _Bounded(io.BufferedReader):
    """A reader, also for zipfile, that never seeks before the start and limits the size of each read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # zipfile reads the last 64 KiB this way
            size = _PIECE_BYTES
        if size > _PIECE_BYTES:
            raise _Unreadable(_TOO_MANY)
        return super().read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_SET and not 0 <= offset < 1 << 62:
            raise _Unreadable(_DAMAGED)
        return super().seek(offset, whence)


def unpack(archive: Path, folder: Path, *, max_bytes: int) -> None:
    """Unpack a tar, tar.gz or zip, detected by content, into the empty `folder`.

    Drops a single folder around all files, and the files that macOS adds. `max_bytes` limits the total unpacked
    size. Raises InvalidAdapter with all problems found, OSError; `folder` is then left empty.
    """
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    written: list[str] = []
    try:
        with _Bounded(io.FileIO(archive)) as file:
            problems = _unpack(file, directory, written, max_bytes)
        if problems:
            raise InvalidAdapter(problems)
    except BaseException:
        for name in written:
            os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(directory)


def _unpack(file: BinaryIO, directory: int, written: list[str], max_bytes: int) -> list[str]:
    """Write the files of an archive and add each name to `written` once it exists; return all problems."""
    layout = _Layout()
    left = max_bytes
    try:
        for count, member in enumerate(_members(file), start=1):
            if count > _MAX_MEMBERS:
                raise _Unreadable(_TOO_MANY)
            left -= member.size
            if left < 0:
                raise _Unreadable(f"the archive unpacks to more than the {max_bytes} bytes allowed")
            name = layout.place(member)
            if name is not None and not layout.problems():
                _write(member.content, name, directory, written)
    except _Unreadable as error:
        return [*layout.problems(), str(error)]
    if not layout.problems() and not written:
        return ["the archive holds no files: pack the folder that holds adapter_config.json"]
    return layout.problems()


def _write(content: Iterator[bytes], name: str, directory: int, written: list[str]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(name, flags, 0o600, dir_fd=directory), "wb", buffering=0) as file:
        written.append(name)
        for piece in content:
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]


@dataclass
class _Layout:
    """The paths of the members, and the problems with them."""

    tops: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def place(self, member: _Member) -> str | None:
        """Return the file name to write, or None if nothing is to be written; record the member's problem, if any."""
        *folders, name = parts = member.name.removeprefix("./").split("/")
        if "__MACOSX" in folders[:1] or name.startswith("._") or name in (".DS_Store", "__MACOSX"):
            return None
        if member.is_folder and parts == ["."]:  # first entry of `tar -C result .`
            return None
        if problem := self._problem(member, folders, name):
            self.wrong.setdefault(problem, []).append(shown(member.name))
            return None
        self.tops.add(name if member.is_folder else "/".join(folders))
        if member.is_folder:
            return None
        self.names.add(name.casefold())
        return name

    def _problem(self, member: _Member, folders: list[str], name: str) -> str | None:
        if member.refused:
            return member.refused
        if not all(map(_is_folder_name, [*folders, name] if member.is_folder else folders)):
            return _NAMES
        if not member.is_folder and not _FILE_NAME.fullmatch(name):
            return _NAMES
        if len(folders) > (0 if member.is_folder else 1):
            return _NESTED
        return _TWICE if not member.is_folder and name.casefold() in self.names else None

    def problems(self) -> list[str]:
        found = []
        for sentence, names in self.wrong.items():
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            found.append(sentence + ", ".join(names[:5]) + more)
        if len(self.tops) > 1:
            found.append(
                "the archive has several folders, or a folder beside the files: pack only one adapter"
            )
        return found


def _is_folder_name(name: str) -> bool:
    """Check a folder's name. The folder is never created, so any printable name without path syntax is valid."""
    return (
        0 < len(name) <= 255 and name.isprintable() and name not in (".", "..") and not set(name) & {*"\\:"}
    )


def _members(file: BinaryIO) -> Iterator[_Member]:
    start = file.read(4)
    file.seek(0)
    if start in (b"PK\3\4", b"PK\5\6"):
        return _zip_members(file)
    whole = _pieces(file)
    return _tar_members(_Forward(_inflated(whole, 31) if start.startswith(b"\x1f\x8b") else whole))


def _pieces(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """Yield the next `size` bytes of a file, or all of it, in pieces; fewer at the end of the file."""
    while piece := file.read(_PIECE_BYTES if size is None else min(size, _PIECE_BYTES)):
        yield piece
        size = None if size is None else size - len(piece)


def _inflated(pieces: Iterator[bytes], window: int) -> Iterator[bytes]:
    """Yield the content of one whole deflate stream (`window` -15) or gzip member (31), in pieces."""
    inflate = zlib.decompressobj(window)
    try:
        for piece in pieces:
            if inflate.eof:
                raise _Unreadable(_TRAILING)
            data = inflate.decompress(piece, _PIECE_BYTES)
            while data:
                yield data
                data = inflate.decompress(inflate.unconsumed_tail, _PIECE_BYTES)
    except zlib.error as error:
        raise _Unreadable(_DAMAGED) from error
    if not inflate.eof:
        raise _Unreadable(_CUT_SHORT)
    if inflate.unused_data:
        raise _Unreadable(_TRAILING)


# tar: only single headers are parsed by tarfile, which reads extension headers of any length into memory


class _Forward:
    """A forward-only reader over pieces of any size."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer at the end."""
        while len(self._rest) < size and (piece := next(self._pieces, b"")):
            self._rest += piece
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def take(self, size: int) -> Iterator[bytes]:
        """Yield exactly the next `size` bytes, in pieces. Raises _Unreadable if the stream ends before."""
        while size:
            piece = self.read(min(size, _PIECE_BYTES))
            if not piece:
                raise _Unreadable(_CUT_SHORT)
            size -= len(piece)
            yield piece


def _tar_members(stream: _Forward) -> Iterator[_Member]:
    extended: dict[bytes, bytes] = {}
    for count in range(_MAX_HEADERS):
        header = _tar_header(stream, is_first=count == 0)
        if header is None:
            return
        if header.type in _EXTENSIONS:
            extended |= _extension(header, stream)
            continue
        name, size = header.name, header.size
        if b"path" in extended:
            name = extended[b"path"].decode("utf-8", "surrogateescape")
        if b"size" in extended:
            size = _decimal(extended[b"size"])
        extended = {}
        if header.type in _LINKS:
            yield _Member(name, 0, iter(()), refused=_SPECIAL)
        elif header.isdir() and size == 0:
            yield _Member(name.rstrip("/"), 0, iter(()), is_folder=True)
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            content = stream.take(size)
            yield _Member(name, size, content)
            deque(content, maxlen=0)  # skip the rest
            stream.read(-size % _BLOCK_BYTES)
        else:
            raise _Unreadable(_SPECIAL + shown(name))
    raise _Unreadable(_TOO_MANY)


def _tar_header(stream: _Forward, *, is_first: bool) -> tarfile.TarInfo | None:
    """Return the next header; None after the last one, if only zeros follow."""
    block = stream.read(_BLOCK_BYTES)
    if len(block) == _BLOCK_BYTES and not any(block):
        padding = stream.read(_MAX_PADDING_BYTES + 1)
        if len(padding) > _MAX_PADDING_BYTES or any(padding):
            raise _Unreadable(_TRAILING)
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        is_short = len(block) < _BLOCK_BYTES
        raise _Unreadable(_NO_ARCHIVE if is_first else _CUT_SHORT if is_short else _DAMAGED) from error
    if header.size < 0:
        raise _Unreadable(_DAMAGED)
    return header


def _extension(header: tarfile.TarInfo, stream: _Forward) -> dict[bytes, bytes]:
    """Return the fields that a header sets for the next member; only `path` and `size` are used."""
    if header.size > _MAX_HEADER_BYTES:
        raise _Unreadable(f"a header of the archive is larger than {_MAX_HEADER_BYTES >> 10} KiB: {_DAMAGED}")
    data = b"".join(stream.take(header.size))
    stream.read(-header.size % _BLOCK_BYTES)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {b"path": data.partition(b"\0")[0]}
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    records = _pax_records(data)
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise _Unreadable("pack the adapter without sparse files (tar's --sparse)")
    if header.type == tarfile.XHDTYPE:
        return records
    if records.keys() & {b"path", b"size"}:  # readers disagree on these when set for all members
        raise _Unreadable(_DAMAGED)
    return {}


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Parse lines of "LENGTH KEY=VALUE"; the length is that of the whole line."""
    records, begin = {}, 0
    while begin < len(data):
        space = data.find(b" ", begin, begin + 8)
        end = begin + _decimal(data[begin : max(space, begin)])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise _Unreadable(_DAMAGED)
        records[key] = value
        begin = end
    return records


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise _Unreadable(_DAMAGED)
    return int(digits)


# zip: zipfile reads the central directory; members are read here, because zipfile trusts the directory


def _zip_members(file: BinaryIO) -> Iterator[_Member]:
    infos, end = _zip_directory(file)
    infos.sort(key=lambda info: info.header_offset)
    begins = [_content_begin(file, info) for info in infos]
    bounds = [*(info.header_offset for info in infos), end][1:]
    for info, begin, bound in zip(infos, begins, bounds, strict=True):
        if begin + info.compress_size > bound:
            raise _Unreadable(f"the files in the archive overlap: {_DAMAGED}")
    for info, begin in zip(infos, begins, strict=True):
        name = info.orig_filename  # `filename` ends at a NUL
        kind = stat.S_IFMT(info.external_attr >> 16)
        if name.endswith("/"):
            special = kind not in (0, stat.S_IFDIR)
            refused = _SPECIAL if special else None
            yield _Member(name.removesuffix("/"), 0, iter(()), is_folder=not special, refused=refused)
        else:
            yield _Member(name, info.file_size, _zip_content(file, info, begin), refused=_refusal(info, kind))


def _refusal(info: zipfile.ZipInfo, kind: int) -> str | None:
    if kind not in (0, stat.S_IFREG):
        return _SPECIAL
    if info.flag_bits & 0x2041:  # encryption of the content, strong encryption, encryption of the directory
        return _ENCRYPTED
    return None if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else _METHOD


def _zip_directory(file: BinaryIO) -> tuple[list[zipfile.ZipInfo], int]:
    """Return the members that a zip lists, and the offset of its central directory."""
    try:
        with zipfile.ZipFile(file) as directory:
            infos, begin, comment = directory.infolist(), directory.start_dir, directory.comment
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise _Unreadable(f"{_DAMAGED} (its central directory cannot be read)") from error
    end = file.seek(0, os.SEEK_END) - _END_OF_ZIP.size - len(comment)
    file.seek(end)
    if _END_OF_ZIP.unpack(file.read(_END_OF_ZIP.size)) != (b"PK\5\6", len(comment)):
        raise _Unreadable(_TRAILING)
    return infos, begin


def _content_begin(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise _Unreadable(_DAMAGED)
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    return file.tell() + int(name_bytes) + int(extra_bytes)


def _zip_content(file: BinaryIO, info: zipfile.ZipInfo, begin: int) -> Iterator[bytes]:
    """Yield the content of a member; check it against the size and checksum in the directory."""
    file.seek(begin)
    packed = _pieces(file, info.compress_size)
    size = checksum = 0
    for piece in _inflated(packed, -15) if info.compress_type == zipfile.ZIP_DEFLATED else packed:
        size += len(piece)
        if size > info.file_size:
            break
        checksum = zlib.crc32(piece, checksum)
        yield piece
    if (size, checksum) != (info.file_size, info.CRC):
        raise _Unreadable(f"the size or checksum of {shown(info.orig_filename)} does not match: {_DAMAGED}")
