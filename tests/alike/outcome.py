"""What a server made of a request, in a form in which two of them can be compared.

How a server cuts a stream into events depends on its timing. What does not is told here: the texts and lists that
the pieces make up, which fields the first piece of a choice has, and where the last pieces stand.
"""

import json
import re
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import Any

from tests.alike.requests import Request
from tests.service import Service

_TEXTS = {"content", "text", "reasoning", "arguments", "refusal", "partial_json", "thinking", "delta"}
"""Fields of events that are pieces of a longer text."""
_DONE = "[DONE]"


@dataclass(frozen=True)
class Outcome:
    """The answer to one request; `content` is the JSON of a reply or error, or what the events of a stream make up."""

    status: int
    content: Any


def send(server: Service, request: Request) -> Outcome:
    """Ask a server, as a client without a key does."""
    status, body = server.call("POST", request.path, request.body, key=None)
    if isinstance(body, str) and body.startswith(("data:", "event:")):
        return Outcome(status, of_stream(body))
    return Outcome(status, body)


def of_stream(text: str) -> dict[str, Any]:
    """What server-sent events make up."""
    data = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    names = re.findall(r"^event: (.*)$", text, re.MULTILINE)
    events = [json.loads(one) for one in data if one != _DONE]
    whole: dict[str, Any] = {"done": [i - len(data) for i, one in enumerate(data) if one == _DONE]}
    if names:
        return {
            **whole,
            "events": _typed(events),
            "names agree": names == [one.get("type") for one in events],
        }
    return {**whole, "chunks": reduce(_joined, events, None), **_layout(events)}


def _typed(events: list[Any]) -> list[Any]:
    """Events that say their type: neighbours of one type are one, and where each stands is only checked."""
    numbers = [event.pop("sequence_number", None) for event in events]
    whole = _without_partial_tokens(events)
    pieces = [reduce(_joined, group) for _, group in groupby(whole, lambda event: event.get("type"))]
    counted = numbers == list(range(len(numbers)))
    return [{"numbered": counted if any(numbers) else None}, *pieces]


def _without_partial_tokens(value: Any, field: str = "") -> Any:
    """vLLM sends a token that completes no character together with the next one, or, if it is faster, not at all."""
    if isinstance(value, dict):
        return {name: _without_partial_tokens(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [
            _without_partial_tokens(one)
            for one in value
            if field != "logprobs" or not isinstance(one, dict) or one.get("token") != ""
        ]
    return value


def _layout(chunks: list[Any]) -> dict[str, Any]:
    """Of a stream of chunks: where its first and last pieces stand."""
    of_choice: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            of_choice.setdefault(choice["index"], []).append(choice)
    return {
        "first": {str(index): of_choice[index][0] for index in sorted(of_choice)},
        "finished by the last": {
            str(index): [i - len(pieces) for i, one in enumerate(pieces) if one["finish_reason"]]
            for index, pieces in sorted(of_choice.items())
        },
        "without choices": [i - len(chunks) for i, one in enumerate(chunks) if not one.get("choices")],
        "usage": _where([bool(chunk.get("usage")) for chunk in chunks]),
        "fields": sorted({field for chunk in chunks for field in chunk}),
    }


def _where(found: list[bool]) -> str:
    if all(found):
        return "everywhere"
    return "at the end" if found[-1] and not any(found[:-1]) else "elsewhere" if any(found) else "nowhere"


def _joined(so_far: Any, piece: Any, field: str = "") -> Any:
    """Two pieces of one answer as one piece."""
    if so_far is None or piece is None:
        return piece if so_far is None else so_far
    if isinstance(so_far, dict) and isinstance(piece, dict):
        return {
            name: _joined(so_far.get(name), piece.get(name), name)
            for name in dict.fromkeys((*so_far, *piece))
        }
    if isinstance(so_far, list) and isinstance(piece, list):
        if not all(isinstance(one, dict) and "index" in one for one in (*so_far, *piece)):
            return so_far + piece
        by_index = {one["index"]: one for one in so_far}
        for one in piece:
            by_index[one["index"]] = _joined(by_index.get(one["index"]), one)
        return [by_index[index] for index in sorted(by_index)]
    if isinstance(so_far, str) and isinstance(piece, str) and field in _TEXTS:
        return so_far + piece
    return piece
