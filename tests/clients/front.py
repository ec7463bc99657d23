"""A server before the service that sees what a client sends, and can change what it gets."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from app import errors


@dataclass
class Front:
    """What came, and what is done to it."""

    target: str
    refusals: list[Exception]
    change: Callable[[bytes], bytes]
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    url: str = ""


@contextmanager
def front_of(
    target: str, *, refusals: Sequence[Exception] = (), change: Callable[[bytes], bytes] = bytes
) -> Iterator[Front]:
    """Pass requests on to the URL `target`: after `refusals`, with one reply each, the service's, through `change`."""
    front = Front(target, list(refusals), change)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            front.paths.append(self.path)
            front.times.append(time.monotonic())
            self._reply(*(_refused(front) if front.refusals else _passed_on(front, self, body)))

        do_GET = do_POST  # noqa: N815

        def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        front.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            yield front
        finally:
            server.shutdown()


def _refused(front: Front) -> tuple[int, dict[str, str], bytes]:
    error = front.refusals.pop(0)
    headers = {**errors.headers(error), "content-type": "application/json"}
    return errors.status_of(error), headers, json.dumps(errors.body(error)).encode()


def _passed_on(
    front: Front, request: BaseHTTPRequestHandler, body: bytes
) -> tuple[int, dict[str, str], bytes]:
    headers = {name: value for name, value in request.headers.items() if name.lower() != "accept-encoding"}
    passed = urllib.request.Request(
        front.target + request.path, body or None, headers, method=request.command
    )
    try:
        with urllib.request.urlopen(passed, timeout=60) as response:
            status, received, content = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, received, content = error.code, error.headers, error.read()
    kept = ("content-type", "retry-after", "x-should-retry")
    return status, {name: received[name] for name in kept if name in received}, front.change(content)
