"""Where this service answers otherwise than stock vLLM on purpose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.alike.compare import Difference
from tests.alike.requests import Request


@dataclass(frozen=True)
class Deliberate:
    """`covers` says whether a difference is this one."""

    name: str
    why: str
    covers: Callable[[Request, Difference], bool]


def _statuses(found: Difference) -> tuple[int, int] | None:
    """Of stock and of ours, where they differ."""
    return (found.stock.status, found.ours.status) if found.where == "status" else None


def _sent(request: Request, name: str) -> Any:
    return request.body.get(name) if isinstance(request.body, dict) else None


_CACHED = (
    "prompt_tokens_details",
    "input_tokens_details",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
)

DELIBERATE = (
    Deliberate(
        "a model must be named",
        "stock answers with the base model; nobody should be answered by weights they did not ask for",
        lambda request, found: not _sent(request, "model") and _statuses(found) in ((200, 400), (200, 404)),
    ),
    Deliberate(
        "a request's id is the service's",
        "two requests of one id are an error inside the engine, and clients that count from 1 would meet",
        lambda request, found: (
            found.where in ("id", "chunks.id")
            if isinstance(_sent(request, "request_id"), str)
            else _sent(request, "request_id") is not None and _statuses(found) == (400, 200)
        ),
    ),
    Deliberate(
        "at most 128 answers to one request",
        "OpenAI's own limit; stock's 16384 let one client take the engine from everybody for minutes",
        lambda request, found: _statuses(found) == (200, 400) and (_sent(request, "n") or 0) > 128,
    ),
    Deliberate(
        "tools without a parser are refused",
        "stock answers as if no tools had been given, though only in the Responses API",
        lambda request, found: (
            _statuses(found) == (200, 400)
            and request.path == "/v1/responses"
            and bool(_sent(request, "tools"))
        ),
    ),
    Deliberate(
        "what a client sent wrong is no server error",
        "stock says 500 where its own check of the request stumbles, and clients try a 500 again",
        lambda request, found: _statuses(found) == (500, 400) and not request.is_right,
    ),
    Deliberate(
        "tokens that were read before are told",
        "stock tells them if it is started so; how many there are depends on what was asked before",
        lambda _, found: any(name in found.where for name in _CACHED),
    ),
    Deliberate(
        "the bytes of a token are its own",
        "stock takes those of its text, in which a part of a character is none",
        lambda _, found: found.where.endswith("].bytes[]"),
    ),
)


def reason(request: Request, difference: Difference) -> str | None:
    """The name of the deliberate difference that covers it."""
    return next((one.name for one in DELIBERATE if one.covers(request, difference)), None)
