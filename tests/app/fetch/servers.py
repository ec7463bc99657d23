"""HTTP servers that tests fetch from, one of them an imitation of the Hugging Face hub."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "1" * 40
MOVED = "2" * 40
CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 1200


class Hub(ThreadingHTTPServer):
    """`files` by commit; `cuts`: number of responses that end early; `redirect`: the actual place of files."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), _Handler)
        self.branches = {"main": COMMIT}
        self.files = {
            COMMIT: {
                "adapter_config.json": CONFIG,
                "adapter_model.safetensors": WEIGHTS,
                "adapter_model.bin": b"x",
            },
            MOVED: {"adapter_config.json": b"{}", "adapter_model.safetensors": b"moved"},
        }
        self.pages: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.cuts = 0
        self.failures = 0
        self.seconds_between_pieces = 0.0
        self.moves_after_info = False
        self.resumes = True
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((path, dict(self.headers)))
        if hub.failures:
            hub.failures -= 1
            return self._send(500, b"")
        if path in hub.redirects:
            return self._send(302, b"", Location=hub.redirects[path])
        if path in hub.pages:
            return self._file(hub.pages[path])
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._info(parts[5] if len(parts) > 4 else "main")
        if len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[4:]) in hub.files.get(parts[3], {}):
            return self._file(hub.files[parts[3]]["/".join(parts[4:])], **{"X-Repo-Commit": parts[3]})
        return self._send(404, b"")

    def _info(self, revision: str) -> None:
        hub = self.server
        commit = hub.branches.get(revision, revision)
        if commit not in hub.files:
            return self._send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        siblings: list[dict[str, Any]] = []
        for name, content in hub.files[commit].items():
            sha = hashlib.sha256(content).hexdigest()
            lfs = {"sha256": sha, "size": len(content), "pointerSize": 100}
            siblings.append({"rfilename": name, "size": len(content), "lfs": lfs})
        if hub.moves_after_info:
            hub.branches["main"] = MOVED
        return self._send(200, json.dumps({"id": "org/repo", "sha": commit, "siblings": siblings}).encode())

    def _file(self, content: bytes, **headers: str) -> None:
        hub, begin = self.server, 0
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if hub.resumes and self.headers.get("If-Range") == etag and "Range" in self.headers:
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if begin else 200)
        rest = content[begin:]
        for name, value in {"ETag": etag, "Content-Length": str(len(rest)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if hub.cuts and len(rest) > 1000:
            hub.cuts -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
            return
        pieces = 20 if hub.seconds_between_pieces else 1
        size = len(rest) // pieces + 1
        for piece in range(0, len(rest), size):
            self.wfile.write(rest[piece : piece + size])
            time.sleep(hub.seconds_between_pieces)

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # a client that was killed
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def running_hub(address: str = "127.0.0.1") -> Iterator[Hub]:
    hub = Hub(address)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.block_on_close = False
        hub.server_close()
