"""What the checks of all clients ask, and what they look at beside the replies."""

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

MODEL = "doctor"
QUESTION = "感冒有什么症状？"
TOO_LONG = QUESTION * 1000
MAX_CONCURRENT_REQUESTS = 8

ENDLESS: dict[str, Any] = {"min_tokens": 900, "ignore_eos": True}
"""With max_tokens=900: an answer of ten seconds, which nobody waits for."""

VISIT: dict[str, Any] = {
    "type": "object",
    "properties": {"day": {"enum": ["Monday", "Friday"]}},
    "required": ["day"],
    "additionalProperties": False,
}
DAYS = ("Monday", "Friday")


def without_blanks(url: str) -> dict[str, int]:
    """A `logit_bias` for JSON: the demo's models know none, and would fill it with blanks up to the limit."""
    return {str(token): -100 for blank in " \t\r\n" for token in _tokens(url, blank)}


def _tokens(url: str, text: str) -> list[int]:
    body = json.dumps({"model": MODEL, "prompt": text, "add_special_tokens": False}).encode()
    request = urllib.request.Request(f"{url}/tokenize", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return list(json.load(response)["tokens"])


def metric(url: str, name: str, label: str = "") -> float:
    """The sum of a metric's series that have the label."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and label in line)


def wait_until(condition: Callable[[], bool], seconds: float = 3) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@contextmanager
def aborted(url: str) -> Iterator[None]:
    """Assert that a client leaves one request in the block, and that the service lets go of it soon."""
    before = _left(url)
    yield
    wait_until(lambda: _left(url) == before + 1 and _in_flight(url) == 0)


@contextmanager
def all_places_taken(url: str) -> Iterator[ExitStack]:
    """Hold every place of the service's, with requests whose bodies do not come, until what is yielded is closed."""
    address = urlsplit(url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"
    with ExitStack() as held:
        for _ in range(MAX_CONCURRENT_REQUESTS):
            place = (address.hostname or "", address.port or 0)
            held.enter_context(socket.create_connection(place)).sendall(head)
        wait_until(lambda: _in_flight(url) == MAX_CONCURRENT_REQUESTS)
        yield held
    wait_until(lambda: _in_flight(url) == 0)


def _left(url: str) -> float:
    return metric(url, "xinglin_requests_total{", 'status="499"')


def _in_flight(url: str) -> float:
    return metric(url, "xinglin_requests_in_flight ")
