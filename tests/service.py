"""A service in a process of its own, and what tests do with it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from tests import warm
from tests.processes import descendants

ROOT = Path(__file__).parent.parent
ADMIN_KEY = "test-admin-key"


@dataclass
class Service:
    """A service in a process of its own. Its log is kept beside the data."""

    data_dir: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ("-m", "app", "serve")
    is_forked: bool = True
    """In tests, from a process that has imported it; otherwise Python is started, as users start it."""
    process: subprocess.Popen[bytes] | warm.Forked = field(init=False)

    def start(self, *, until_ready: bool = True) -> None:
        settings = {
            "XINGLIN_DATA_DIR": str(self.data_dir),
            "XINGLIN_PORT": str(self.port),
            "XINGLIN_ADMIN_KEY": ADMIN_KEY,
            "XINGLIN_RECONCILE_SECONDS": "0.2",
            "VLLM_CACHE_ROOT": str(ROOT / ".cache" / "vllm"),
        }
        environment = {**os.environ, **settings, **self.environment}
        if self.is_forked and warm.is_owned():
            self.process = warm.start(self.command, environment, self.log_path, ROOT)
        else:
            with self.log_path.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, *self.command], env=environment, stdout=log, stderr=log, cwd=ROOT
                )
        if until_ready:
            self.wait_until_ready()

    @property
    def log_path(self) -> Path:
        return self.data_dir / "service.log"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self, seconds: float = 150) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the service ended:\n{self.log[-4000:]}"
            try:
                urllib.request.urlopen(f"{self.url}/readyz", timeout=5).close()
                return
            except urllib.error.HTTPError as error:
                error.close()
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.25)
        raise TimeoutError(f"not ready after {seconds} s:\n{self.log[-4000:]}")

    @staticmethod
    def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)

    def started(self, what: str = "") -> list[int]:
        """The processes that the service started, and those that they started, with `what` in their command."""
        return descendants(self.process.pid, what)

    def engine_pids(self) -> list[int]:
        """The processes that run an engine."""
        return self.started("VLLM")

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", **{"max_retries": 0, **options})

    def call(self, method: str, path: str, body: Any = None, key: str | None = ADMIN_KEY) -> tuple[int, Any]:
        """Status and body of one request; the body is JSON where it can be read as such."""
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode()

    def adapters(self) -> dict[str, Any]:
        """GET /v1/adapters: alias statuses by `name@alias`, and the first `engine`."""
        status, body = self.call("GET", "/v1/adapters")
        assert status == 200, body
        by_alias = {f"{entry['name']}@{entry['alias']}": entry for entry in body["data"]}
        return {**by_alias, "engine": body["engines"][0]}

    def answer(self, model: str, question: str, **options: Any) -> str:
        """The greedy answer to one question."""
        reply = self.client().chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], **{"temperature": 0, **options}
        )
        return reply.choices[0].message.content or ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
