"""Adapters uploaded as archives: proved and served, or refused without leaving files."""

import gzip
import http.client
import json
import socket
import stat
import tarfile
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore
from tests.adapters.archives import header, moded, packed, patched, pax, raw, tar, tgz
from tests.adapters.test_archive import LINKS, NAMES, NO_ARCHIVES, SPARSE
from tests.adapters.test_archive_bombs import BOMBS
from tests.app.spoilt import Unharmed, asked, begun, demo_folder, listing
from tests.conftest import MAX_UPLOAD_BYTES
from tests.service import ADMIN_KEY, Service

SMALL = b"x"


@pytest.fixture(scope="module")
def store(service: Service) -> AdapterStore:
    return AdapterStore(service.data_dir / "store")


@pytest.fixture(scope="module")
def members(store: AdapterStore, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    """The files of a valid adapter."""
    folder = demo_folder(tmp_path_factory.mktemp("sound") / "adapter", store)
    return [(path.name, path.read_bytes()) for path in sorted(folder.write().iterdir())]


@pytest.fixture(scope="module")
def unharmed(service: Service) -> Unharmed:
    return Unharmed.of(service, "xinglin-demo", "doctor")


@pytest.fixture(scope="module", autouse=True)
def _nobody_noticed(service: Service, store: AdapterStore, unharmed: Unharmed) -> Iterator[None]:
    before, shown = store.pointed(), service.adapters().keys()
    yield
    for name, alias in store.pointed().keys() - before.keys():
        store.remove_alias(name, alias, actor="test")
    service.wait_for(lambda: service.adapters().keys() == shown)
    assert Unharmed.of(service, "xinglin-demo", "doctor") == unharmed


@pytest.fixture
def nothing_left(service: Service) -> Iterator[None]:
    """Check that the store and the folder of transfers are unchanged afterwards."""
    before, failures = listing(service.data_dir), service.log.count("Traceback")
    yield
    assert service.log.count("Traceback") == failures, service.log[-4000:]
    service.wait_for(lambda: listing(service.data_dir) == before)
    assert leftovers(service) == []


def leftovers(service: Service) -> list[Path]:
    folders = (service.data_dir / "imports", service.data_dir / "store" / ".staging")
    return [path for folder in folders for path in folder.glob("[!.]*")]


def form(*parts: tuple[str, str | None, bytes], boundary: str = uuid.uuid4().hex) -> tuple[str, bytes]:
    """Return content type and body of a multipart form of (field, file name, content)."""
    body = b""
    for field, filename, content in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        body += f'--{boundary}\r\ncontent-disposition: form-data; name="{field}"{named}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return f"multipart/form-data; boundary={boundary}", body + f"--{boundary}--\r\n".encode()


def post(
    service: Service, content_type: str | None, body: bytes, key: str | None = ADMIN_KEY
) -> tuple[int, Any]:
    headers = {} if content_type is None else {"content-type": content_type}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.request("POST", "/v1/adapters", body, headers)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def upload(service: Service, archive: bytes, name: str = "uploaded", **fields: str) -> tuple[int, Any]:
    parts = [(field, None, value.encode()) for field, value in {"name": name, **fields}.items()]
    return post(service, *form(*parts, ("file", "adapter.bin", archive)))


ARCHIVES: dict[str, Callable[..., bytes]] = {
    "tar.gz": tgz,
    "tar": tar,
    "zip": packed,
    "stored zip": lambda *members: packed(*members, method=zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("prefix", ["", "result/"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_upload_is_proved_and_answers(
    service: Service, members: list[tuple[str, bytes]], unharmed: Unharmed, kind: str, prefix: str
) -> None:
    name = f"{kind.replace(' ', '-')}-{len(prefix)}"
    archive = ARCHIVES[kind](*((prefix + file, content) for file, content in members))
    status, reply = upload(service, archive, name, why="an upload")
    assert (status, reply["name"], reply["alias"]) == (200, name, "default"), reply
    shown = service.adapters()[f"{name}@default"]
    assert (shown["actual"], shown["status"], shown["proven"]) == (reply["revision"], "ready", True)
    assert service.answer(name, "感冒有什么症状？") == unharmed.answers["doctor"]
    assert leftovers(service) == []


def test_the_file_may_come_before_the_name(service: Service, members: list[tuple[str, bytes]]) -> None:
    parts = [("file", "a.zip", packed(*members)), ("alias", None, b"late"), ("name", None, b"file-first")]
    status, reply = post(service, *form(*parts))
    assert (status, reply.get("alias")) == (200, "late"), reply
    assert asked(service, "file-first@late")[0] == 200


def test_without_an_alias_it_is_published_only(
    service: Service, store: AdapterStore, members: list[tuple[str, bytes]]
) -> None:
    status, reply = upload(service, tgz(*members), "unpointed", alias="")
    assert (status, reply["alias"]) == (200, None), reply
    assert store.aliases("unpointed") == {}
    assert [manifest.revision for manifest in store.revisions("unpointed")] == [reply["revision"]]
    assert asked(service, "unpointed")[0] == 404


def test_concurrent_uploads_do_not_delay_streams(service: Service, members: list[tuple[str, bytes]]) -> None:
    running = begun(service, "doctor", tokens=300)
    archives = [tgz(*members), b"no archive", packed(*members), BOMBS["gzip of zeros"]] * 3
    with ThreadPoolExecutor(len(archives)) as pool:
        replies = [*pool.map(lambda archive: upload(service, archive, "at-once")[0], archives)]
    assert replies == [200, 400, 200, 400] * 3
    assert "".join(running)
    assert leftovers(service) == []


HOSTILE: dict[str, bytes] = {
    **{f"tar {ascii(name)[:30]}": tgz((name, SMALL)) for name in NAMES[::2]},
    **{f"zip {ascii(name)[:30]}": packed((name, SMALL)) for name in NAMES[1::2]},
    **{f"tar member of kind {kind!r}": tgz((header(kind, "a", linkname="/etc/passwd"), b"")) for kind in LINKS},
    **{
        f"zip member of kind {kind:o}": packed((moded("a.json", kind | 0o777), b"/etc/passwd"))
        for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK)
    },
    **{f"sparse: {name}": content for name, content in SPARSE.items()},
    **{f"no archive: {name}": content for name, content in NO_ARCHIVES.items()},
    **{f"bomb: {name}": content for name, content in BOMBS.items()},
    "encrypted zip": patched(packed(("a.json", SMALL)), b"PK\1\2", 8, b"\1"),
    "zip of another method": packed(("a.json", SMALL), method=zipfile.ZIP_LZMA),
    "zip in a zip": packed(("inner.zip", packed(("adapter_config.json", b"{}")))),
    "tar cut short": tgz(("adapter_config.json", b"{}" * 999))[:60],
    "zip cut short": packed(("adapter_config.json", b"{}" * 999))[:-10],
    "a link, then a file through it": tgz(
        (header(tarfile.SYMTYPE, "result", linkname="/etc"), b""), ("result/pwned", SMALL)
    ),
    "cases collide": tgz(("adapter_config.json", b"{}"), ("Adapter_Config.json", b"{}")),
    "100k members": gzip.compress(raw(header(tarfile.REGTYPE, "a")) * 100_000, 1),
    "a path in a pax header": gzip.compress(pax(b"22 path=../../../pwned\n") + tar(("a", SMALL))),
    "no adapter": tgz(("README.md", b"hello")),
    "a pickle": packed(("adapter_model.bin", b"cos\nsystem\n(S'touch pwned'\ntR."), ("adapter_config.json", b"{}")),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused(service: Service, nothing_left: None, name: str) -> None:
    status, reply = upload(service, HOSTILE[name])
    assert status == 400, reply
    assert reply["error"]["problems"] or reply["error"]["code"] == "request_too_large"
    assert str(service.data_dir) not in json.dumps(reply)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([("name", None, b"uploaded")], "file"),
        ([], "file"),
        ([("name", None, b"uploaded"), ("file", None, b"text")], "file"),
        ([("name", None, b"uploaded"), ("file", "a.zip", b"")], "archive"),
        ([("name", None, b"uploaded"), ("file", "a.zip", b"PK"), ("file", "b.zip", b"PK")], "files"),
        ([("file", "a.zip", packed(("a", b"x")))], "name"),
        ([("name", None, b"../x"), ("file", "a.zip", packed(("a", b"x")))], "name"),
        ([("name", None, b"\xff\xfe"), ("file", "a.zip", packed(("a", b"x")))], ""),
        ([("name", None, b"xinglin-demo"), ("file", "a.zip", packed(("a", b"x")))], ""),
        ([("name", "name.txt", b"uploaded"), ("file", "a.zip", b"x")], "files"),
        ([("name", None, b"a"), ("alias", None, b"a/b"), ("file", "a.zip", b"x")], "alias"),
        ([("name", None, b"a"), ("path", None, b"x"), ("file", "a.zip", b"x")], "path"),
        ([("name", None, b"a"), ("source", None, b"hf://a/b"), ("file", "a.zip", b"x")], "source"),
        ([("name", None, b"a"), ("extra", None, b"x"), ("file", "a.zip", b"x")], "extra"),
        ([("name", None, b"a"), ("why", None, b"x" * 501), ("file", "a.zip", b"x")], "why"),
        ([(f"field-{n}", None, b"x") for n in range(100)], "fields"),
        ([("name", None, b"x" * (2 << 20)), ("file", "a.zip", b"x")], ""),
        ([("name", None, b"uploaded"), ("file", "../../" + "x" * 9000, b"x")], ""),
    ],
)  # fmt: skip
def test_invalid_forms_are_refused(
    service: Service, nothing_left: None, parts: list[tuple[str, str | None, bytes]], told: str
) -> None:
    status, reply = post(service, *form(*parts))
    assert status == 400, reply
    assert told in json.dumps(reply["error"])


@pytest.mark.parametrize(
    "content_type",
    [
        None, "", "application/zip", "application/octet-stream", "text/plain", "multipart/form-data",
        "multipart/form-data; boundary=", "multipart/form-data; boundary=other", "multipart/mixed; boundary=x",
        "multipart/form-data; boundary=" + "x" * 2000, "multipart/form-data; boundary=é",
        "multipart/form-data; charset=nonsense; boundary=x",
    ],
)  # fmt: skip
def test_another_content_type(
    service: Service, nothing_left: None, members: list[tuple[str, bytes]], content_type: str | None
) -> None:
    body = form(("name", None, b"uploaded"), ("file", "a.zip", packed(*members)), boundary="y")[1]
    status, reply = post(service, content_type and content_type.encode("latin-1"), body)  # type: ignore[arg-type]
    assert status == 400, reply
    assert isinstance(reply["error"]["code"], str)


@pytest.mark.parametrize(
    "body", [b"", b"--x", b"--x\r\n", b"garbage" * 1000, b"--x\r\n\r\n\r\n--x--\r\n", b"--x--"]
)
def test_bodies_that_are_not_forms_are_refused(service: Service, nothing_left: None, body: bytes) -> None:
    status, reply = post(service, "multipart/form-data; boundary=x", body)
    assert status == 400, reply


def head(service: Service, *more: str, key: str | None = ADMIN_KEY) -> bytes:
    lines = [
        "POST /v1/adapters HTTP/1.1",
        f"host: 127.0.0.1:{service.port}",
        "content-type: multipart/form-data; boundary=x",
        *([f"authorization: Bearer {key}"] if key else []),
        *more,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("declared", ["content-length", "chunked"])
def test_a_client_disconnects_during_an_upload(
    service: Service, nothing_left: None, members: list[tuple[str, bytes]], declared: str, share: float
) -> None:
    _, body = form(("name", None, b"uploaded"), ("file", "a.zip", packed(*members)), boundary="x")
    part = body[: int(len(body) * share)]
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        if declared == "chunked":
            connection.sendall(head(service, "transfer-encoding: chunked"))
            connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        else:
            connection.sendall(head(service, f"content-length: {len(body)}") + part)
        time.sleep(0.3)
    assert asked(service, "doctor")[0] == 200


def test_a_client_disconnects_during_the_proof(
    service: Service, store: AdapterStore, members: list[tuple[str, bytes]]
) -> None:
    """The adapter may be published and the alias may move, but nothing else is left."""
    _, body = form(("name", None, b"left"), ("file", "a.zip", packed(*members)), boundary="x")
    for seconds in (0, 0.2, 0.5, 1):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(head(service, f"content-length: {len(body)}") + body)
            time.sleep(seconds)
    service.wait_for(lambda: leftovers(service) == [])
    if "left" in store.names():
        aliased = store.aliases("left").get("default")
        service.wait_for(lambda: service.adapters().get("left@default", {}).get("actual") == aliased)


@pytest.mark.parametrize("declared", ["content-length", "chunked"])
def test_too_large_an_upload_is_aborted(service: Service, nothing_left: None, declared: str) -> None:
    _, body = form(("name", None, b"uploaded"), ("file", "a.zip", b""), boundary="x")
    start, piece = body.partition(b"\r\n--x--")[0], bytes(1 << 20)
    sent = 0
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        chunked = declared == "chunked"
        connection.sendall(
            head(service, "transfer-encoding: chunked" if chunked else f"content-length: {1 << 40}")
        )
        reply = bytearray()

        def listen() -> None:
            while b"}}" not in reply and (piece := connection.recv(1 << 16)):
                reply.extend(piece)

        listening = threading.Thread(target=listen)
        listening.start()
        for data in (start, *[piece] * (4 * MAX_UPLOAD_BYTES >> 20)):
            if not listening.is_alive():
                break
            try:
                connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n" if chunked else data)
            except OSError:
                break
            sent += len(data)
            time.sleep(0.01)
        listening.join(20)
    assert b" 400 " in reply.partition(b"\r\n")[0]
    assert b"request_too_large" in reply
    assert b"XINGLIN_MAX_ADAPTER_GIB" in reply
    assert sent <= 3 * MAX_UPLOAD_BYTES


@pytest.mark.parametrize("key", [None, "wrong", "é" * 9, "x" * 10_000])
def test_without_the_key_no_body_is_read(service: Service, nothing_left: None, key: str | None) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(head(service, f"content-length: {1 << 40}", key=key))
        assert b" 401 " in connection.recv(1 << 16).partition(b"\r\n")[0]
