"""A seeded choice of requests from all that clients may send."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.alike import options
from tests.alike.options import Options
from tests.bench.serve.stock import BASE_MODEL
from training.demo.corpus import bundled_questions

MODELS = (BASE_MODEL, "doctor", "leaflet")
_WRONG_SHARE = 0.3
_BROKEN = (b"", b"{", b"[]", b"null", b'"x"', b"7", b"\xff\xfe", b'{"model": "doctor"', b"{}", b"[" * 100_000)


@dataclass(frozen=True)
class Request:
    """One request; `options` is what sets it apart from a plain one, for who reads about it."""

    path: str
    body: Any
    options: Options
    is_right: bool
    """False when something in it is wrong on purpose."""


@dataclass(frozen=True)
class _Endpoint:
    path: str
    weight: int
    right: tuple[Options, ...]
    wrong: tuple[Options, ...]
    required: tuple[str, ...]


_ENDPOINTS = (
    _Endpoint(
        "/v1/chat/completions", 11, options.SAMPLING + options.CHAT,
        options.SAMPLING_WRONG + options.CHAT_WRONG, ("model", "messages"),
    ),
    _Endpoint(
        "/v1/completions", 4, options.SAMPLING + options.COMPLETION,
        options.SAMPLING_WRONG + options.COMPLETION_WRONG, ("model", "prompt"),
    ),
    _Endpoint("/v1/responses", 3, options.RESPONSES, options.RESPONSES_WRONG, ("model", "input")),
    _Endpoint("/v1/messages", 3, options.MESSAGES, options.MESSAGES_WRONG, ("model", "messages", "max_tokens")),
    _Endpoint("/v1/messages/count_tokens", 1, options.MESSAGES, options.MESSAGES_WRONG, ("model", "messages")),
    _Endpoint("/tokenize", 1, options.TOKENIZE, options.TOKENIZE_WRONG, ("model", "prompt")),
    _Endpoint("/detokenize", 1, options.DETOKENIZE, options.DETOKENIZE_WRONG, ("model", "tokens")),
)  # fmt: skip


class _Deck:
    """Cards in a random order, each drawn once before any is drawn again."""

    def __init__(self, cards: Sequence[Options], chance: random.Random) -> None:
        self._cards = cards
        self._chance = chance
        self._left: list[Options] = []

    def draw(self) -> Options:
        if not self._left:
            self._left = self._chance.sample(self._cards, len(self._cards))
        return self._left.pop()


def make_requests(count: int, seed: int) -> list[Request]:
    """So many requests, the same ones for the same seed."""
    chance = random.Random(seed)
    right = {endpoint.path: _Deck(endpoint.right, chance) for endpoint in _ENDPOINTS}
    wrong = {endpoint.path: _Deck(_all_wrong(endpoint), chance) for endpoint in _ENDPOINTS}
    chosen = chance.choices(_ENDPOINTS, [endpoint.weight for endpoint in _ENDPOINTS], k=count)
    return [_request(endpoint, right[endpoint.path], wrong[endpoint.path], chance) for endpoint in chosen]


def _all_wrong(endpoint: _Endpoint) -> list[Options]:
    return [
        *endpoint.wrong,
        *({"without": name} for name in endpoint.required),
        *({"raw": content} for content in _BROKEN),
    ]


def _request(endpoint: _Endpoint, right: _Deck, wrong: _Deck, chance: random.Random) -> Request:
    plain = _plain(endpoint.path, chance)
    if chance.random() < _WRONG_SHARE:
        fault = wrong.draw()
        if "raw" in fault:
            return Request(endpoint.path, fault["raw"], fault, is_right=False)
        body = _merged(plain, fault)
        body.pop(body.pop("without", ""), None)
        return Request(endpoint.path, body, fault, is_right=False)
    extra = right.draw()
    if chance.random() < 0.5:
        extra = {**right.draw(), **extra}
    return Request(endpoint.path, _answerable_by_stock(_merged(plain, extra)), extra, is_right=True)


def _merged(plain: dict[str, Any], extra: Options) -> dict[str, Any]:
    """/tokenize takes a prompt or messages."""
    left_out = "prompt" if "messages" in extra else None
    return {**{name: value for name, value in plain.items() if name != left_out}, **extra}


def _answerable_by_stock(body: dict[str, Any]) -> dict[str, Any]:
    """The body, without log-probabilities of prompts when it has several: on CPU they end stock's engine."""
    prompts = body.get("prompt")
    is_one = (body.get("n") or 1) == 1 and not (isinstance(prompts, list) and len(prompts) > 1)
    unwanted = () if is_one else ("prompt_logprobs", "echo")
    return {name: value for name, value in body.items() if name not in unwanted}


def _plain(path: str, chance: random.Random) -> dict[str, Any]:
    """A short greedy request that any server answers."""
    question = chance.choice(bundled_questions(chance.choice(("zh", "en"))))
    model = {"model": chance.choice(MODELS)}
    messages = [{"role": "user", "content": question}]
    plain: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": messages, "temperature": 0, "max_tokens": 12},
        "/v1/completions": {"prompt": question, "temperature": 0, "max_tokens": 12},
        "/v1/responses": {"input": question, "temperature": 0, "max_output_tokens": 12},
        "/v1/messages": {"messages": messages, "temperature": 0, "max_tokens": 12},
        "/v1/messages/count_tokens": {"messages": messages},
        "/tokenize": {"prompt": question},
        "/detokenize": {"tokens": chance.choices(range(5, 2048), k=8)},
    }
    return model | plain[path]
