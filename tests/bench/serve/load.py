"""One load for every side: streamed chats from so many clients at once, in a process of its own.

    python -m tests.bench.serve.load --port 8000 --models xinglin-demo doctor --streams 64 --requests 128

Client i asks model i of those given, turn about, one question after another over one connection, each for exactly
`--tokens` tokens (greedy, `ignore_eos`). While it lasts, what comes is only kept with the time of each read, and looked
into when all is over: so that the load costs the machine little, and both sides the same.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import uvloop

from tests.service import ROOT

HOST = "127.0.0.1"
QUESTIONS = (
    "感冒有什么症状？",
    "What are the symptoms of gout?",
    "如何预防糖尿病？",
    "高血压患者平时应该注意什么？",
)
TOKENS = 64
_EVENT = b"data: {"
_END = b"\r\n0\r\n\r\n"


@dataclass
class Load:
    """What the clients saw; times in seconds."""

    seconds: float
    answers: int
    tokens: int
    events: int
    """Those with tokens: fewer than tokens where a side was late and merged some."""
    first_token: dict[str, float]
    gap: dict[str, float]
    """Between two reads of a stream that brought tokens."""
    client_cpu_seconds: float
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    """The first of them."""
    texts: list[tuple[str, int, str]] = field(default_factory=list)
    """If asked for: model, number of the question, answer."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def run_load(
    port: int,
    models: Sequence[str],
    streams: int,
    requests: int,
    *,
    texts: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> Load:
    """A load in a process of its own. `on_end` is called when all has come, before the clients look into it."""
    command = [
        sys.executable, "-m", "tests.bench.serve.load", "--port", str(port), "--models", *models, "--streams",
        str(streams), "--requests", str(requests), *(["--texts"] if texts else []),
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as clients:
        assert clients.stdout
        if clients.stdout.readline():
            on_end()
        found = clients.stdout.readline()
    if not found:
        raise RuntimeError("the clients failed, and have said why")
    return Load(**json.loads(found))


@dataclass(slots=True)
class _Answer:
    model: str
    question: int
    sent: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None


class _Clients:
    def __init__(self, port: int, models: Sequence[str], requests: int, tokens: int) -> None:
        self._port = port
        self._models = models
        self._tokens = tokens
        self._left: Iterator[int] = iter(range(requests))
        self.answers: list[_Answer] = []

    async def run(self, streams: int, limit: float) -> None:
        """Ask until all requests are answered, or `limit` seconds have passed."""
        try:
            async with asyncio.timeout(limit):
                await asyncio.gather(
                    *(self._client(self._models[i % len(self._models)]) for i in range(streams))
                )
        except TimeoutError:
            for answer in self.answers:
                if not answer.reads or not _is_whole(answer):
                    answer.failure = f"no whole answer within {limit:g} s"

    async def _client(self, model: str) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for number in self._left:
            question = number // len(self._models) % len(QUESTIONS)  # each model gets all of them
            connection = connection or await asyncio.open_connection(HOST, self._port)
            answer = _Answer(model, question, time.perf_counter())
            self.answers.append(answer)
            connection[1].write(self._request(model, question))
            await _read(connection[0], answer)
            if answer.failure:
                connection[1].close()
                connection = None
        if connection:
            connection[1].close()

    def _request(self, model: str, question: int) -> bytes:
        body = json.dumps(
            {
                "model": model, "messages": [{"role": "user", "content": QUESTIONS[question]}], "stream": True,
                "temperature": 0, "max_tokens": self._tokens, "ignore_eos": True,
            }
        ).encode()  # fmt: skip
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body


async def _read(reader: asyncio.StreamReader, answer: _Answer) -> None:
    end = b""
    while end != _END:
        try:
            data = await reader.read(1 << 16)
        except OSError as error:
            data, answer.failure = b"", type(error).__name__
        answer.reads.append((time.perf_counter(), data))
        if not answer.reads[0][1].startswith(b"HTTP/1.1 200"):
            answer.failure = data[:400].decode(errors="replace")
        elif not data:
            answer.failure = answer.failure or "the connection was closed within an answer"
        if answer.failure:
            return
        end = (end + data)[-len(_END) :]


def _is_whole(answer: _Answer) -> bool:
    end = b"".join(data for _, data in answer.reads[-8:])
    return b'"finish_reason":"length"' in end and b"data: [DONE]" in end


def _token_times(answer: _Answer) -> tuple[list[float], int]:
    """When reads came that brought tokens, and how many events did: the first event holds the role alone."""
    times, events, rest = [], 0, b""
    for at, data in answer.reads:
        new = (rest + data).count(_EVENT)
        rest = data[1 - len(_EVENT) :]
        events += new
        if new and events > 1:
            times.append(at)
    return times, max(0, events - 1)


def _text(answer: _Answer) -> str:
    body = b"".join(data for _, data in answer.reads)
    chunks = [json.loads(event) for event in re.findall(rb"data: (\{.*\})\n\n", body)]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 99th; none of no values."""
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 99) if ordered}


def _summary(clients: _Clients, seconds: float, cpu: float, *, tokens: int, texts: bool) -> Load:
    for answer in clients.answers:
        if answer.failure is None and not _is_whole(answer):
            answer.failure = "the answer was cut: " + answer.reads[-1][1][-300:].decode(errors="replace")
    whole = [answer for answer in clients.answers if answer.failure is None]
    failures = [f"{answer.model}: {answer.failure}" for answer in clients.answers if answer.failure]
    timed = [(answer, *_token_times(answer)) for answer in whole]
    gaps = [late - early for _, at, _ in timed for early, late in pairwise(at)]
    return Load(
        seconds=seconds,
        answers=len(whole),
        tokens=len(whole) * tokens,
        events=sum(events for _, _, events in timed),
        first_token=percentiles([at[0] - answer.sent for answer, at, _ in timed]),
        gap=percentiles(gaps),
        client_cpu_seconds=cpu,
        failed=len(failures),
        failures=failures[:3],
        texts=[(answer.model, answer.question, _text(answer)) for answer in whole] if texts else [],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True, help=f"of a service on {HOST}")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument(
        "--limit", type=float, default=180, help="seconds after which what is left has failed"
    )
    parser.add_argument("--texts", action="store_true", help="give all answers, too")
    options = parser.parse_args()
    clients = _Clients(options.port, options.models, options.requests, options.tokens)
    began, cpu = time.perf_counter(), time.process_time()
    uvloop.run(clients.run(options.streams, options.limit))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print("ended", flush=True)
    found = _summary(clients, seconds, cpu, tokens=options.tokens, texts=options.texts)
    print(json.dumps(asdict(found), ensure_ascii=False))


if __name__ == "__main__":
    main()
