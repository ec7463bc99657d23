"""A judge behind an OpenAI-compatible endpoint, which says what it is told to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Judge:
    url: str
    asked: list[tuple[str | None, dict[str, Any]]] = field(default_factory=list)
    """The key and the body of each request."""


@contextmanager
def running_judge(says: Callable[[str], str | int]) -> Iterator[Judge]:
    """`says`: what it answers to a prompt, or the status that it fails with."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.asked.append((self.headers["Authorization"], body))
            said = says(body["messages"][0]["content"]) if self.path == "/v1/chat/completions" else 404
            self.send_response(said if isinstance(said, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge = Judge(f"http://127.0.0.1:{server.server_port}/v1")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield judge
        server.shutdown()
