"""A client of the service: streamed answers with the time of each token, and admin calls."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import aiohttp

MAX_TOKENS = 64
_SILENCE_SECONDS = 120
"""A stream that sends no byte for this long has failed."""


@dataclass(slots=True)
class Answer:
    """One streamed answer. Times are those of perf_counter."""

    model: str
    question: int
    sent: float
    began: float = 0.0
    """Time of the response status, at which the revision is known."""
    ended: float = 0.0
    revision: str | None = None
    text: str = ""
    failure: str | None = None
    """Why the answer is incomplete."""
    tokens_at: list[float] = field(default_factory=list)


class CallFailed(Exception):
    """The service refused an admin call, or was unreachable."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Client:
    """One HTTP session with the service. Use as an async context manager."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._authorization = {"authorization": f"Bearer {key}"}
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_SECONDS),
            headers=self._authorization,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def ask(
        self, model: str, question: int, messages: Sequence[dict[str, str]], session: str | None = None
    ) -> Answer:
        """Stream one greedy answer to its end. Errors are recorded in `Answer.failure`, never raised."""
        body = {
            "model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True
        }  # fmt: skip
        headers = {"content-type": "application/json"} | ({"x-session-id": session} if session else {})
        reads: list[tuple[float, bytes]] = []
        answer = Answer(model, question, perf_counter())
        try:
            async with self._http.post(
                f"{self._url}/v1/chat/completions", data=json.dumps(body), headers=headers
            ) as response:
                answer.began = perf_counter()
                answer.revision = response.headers.get("x-adapter-revision")
                # Record only bytes and times here; parsing them now would delay the next read.
                async for piece in response.content.iter_any():
                    reads.append((perf_counter(), piece))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer.failure = f"{_how_far(answer, error)}: {type(error).__name__}"
        else:
            if response.status != 200:
                answer.failure = (
                    f"HTTP {response.status} {_error_code(b''.join(p for _, p in reads))}".strip()
                )
        answer.ended = perf_counter()
        if answer.failure is None:
            _read_events(answer, reads)
        return answer

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make an admin call and return its reply. Raises CallFailed."""
        return await self._reply(method, path, json=body)

    async def publish(self, name: str, archive: bytes, *, alias: str | None = None, why: str) -> str:
        """Upload an adapter and point `alias`, if given, at it; return the new revision. Raises CallFailed."""
        form = aiohttp.FormData()
        for key, value in (("name", name), ("alias", alias or ""), ("why", why)):
            form.add_field(key, value)
        form.add_field(
            "file", io.BytesIO(archive), filename="adapter.tar", content_type="application/octet-stream"
        )
        reply = await self._reply("POST", "/v1/adapters", data=form)
        return str(reply["revision"])

    async def text(self, path: str) -> str:
        """Return the body of a GET. Raises CallFailed."""
        try:
            async with self._http.get(self._url + path) as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CallFailed(f"GET {path}: {error or type(error).__name__}") from error

    async def _reply(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            async with self._http.request(method, self._url + path, **content) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CallFailed(f"{method} {path}: {error or type(error).__name__}") from error
        try:
            reply = json.loads(body)
        except ValueError:
            reply = None
        if response.status >= 400 or not isinstance(reply, dict):
            error_of = reply.get("error") if isinstance(reply, dict) else None
            said = error_of.get("message", "") if isinstance(error_of, dict) else "no JSON object"
            raise CallFailed(f"{method} {path}: {response.status} {said}", response.status, _error_code(body))
        return reply


def _how_far(answer: Answer, error: Exception) -> str:
    """Tell a refused or closed connection from an answer that was cut off."""
    if answer.began:
        return "cut"
    is_refused = isinstance(error, aiohttp.ClientConnectorError)
    return "connection refused" if is_refused else "connection closed before any byte"


def _error_code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def _read_events(answer: Answer, reads: Sequence[tuple[float, bytes]]) -> None:
    """Fill in the text, the time of each token, and the failure if the stream is incomplete."""
    rest, is_done, finish, pieces = b"", False, None, []
    for at, piece in reads:
        *events, rest = (rest + piece).split(b"\n\n")
        grew = False
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                is_done = True
                continue
            try:
                chunk = json.loads(data)
                choice = chunk["choices"][0]
            except (ValueError, KeyError, IndexError, TypeError):
                answer.failure = "an error inside the stream"
                return
            content = choice["delta"].get("content")
            if content:
                pieces.append(content)
                grew = True
            finish = choice.get("finish_reason") or finish
        if grew:
            answer.tokens_at.append(at)
    answer.text = "".join(pieces)
    if not (is_done and finish in ("stop", "length")):
        answer.failure = f"cut: ended with finish_reason {finish}{'' if is_done else ' and without [DONE]'}"
