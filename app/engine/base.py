"""What the service needs of an engine. app.engine.vllm is the one there is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from adapters import BaseModelFacts
from app.engine.history import Cut
from app.engine.stats import EngineStats


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in the engine. `engine_id` is new for every load and never used again."""

    name: str
    """`name@revision`"""
    engine_id: int
    folder: Path
    template: str | None = None
    """Its own chat template, in place of the base model's."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides what the client says."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, besides the base model's own."""


@dataclass(frozen=True)
class TokenScore:
    """How likely the engine holds one given token to be."""

    logprob: float
    """Natural logarithm."""
    best: float
    """The same for the likeliest token at this place."""


class Observer(Protocol):
    """Follows an answer as the engine writes it: text as the model wrote it, before tool calls are taken out of it.

    Called on the event loop, between the engine and the client: to be quick, and to raise nothing.
    """

    def read(self, prompt_tokens: int) -> None:
        """The engine read a prompt of so many tokens."""
        ...

    def wrote(self, choice: int, text: str, tokens: int) -> None:
        """The engine added text and tokens to a choice; `text` may be empty. A whole answer comes in one call."""
        ...


class Unobserved:
    """The observer of an answer that nobody follows."""

    def read(self, prompt_tokens: int) -> None:
        """See Observer."""

    def wrote(self, choice: int, text: str, tokens: int) -> None:
        """See Observer."""


DONE = b"data: [DONE]\n\n"
"""What many streams end with: no other event does, as there are no line ends within one."""


class Events(Protocol):
    """Server-sent events, ready to send; `aclose` it when nobody reads on. Raises ApiError after an error event."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    def __anext__(self) -> Awaitable[bytes]: ...
    def aclose(self) -> Awaitable[None]: ...


@dataclass(frozen=True)
class Answer:
    """What an engine answers one request."""

    reply: dict[str, Any] | Events
    """Whole, or as server-sent events."""
    cut: Cut | None = None
    """What of a long conversation the model was not given."""
    rest: asyncio.Future[Any] | None = None
    """What goes on being made after the reply (`background`), until it is done."""


class Endpoint(StrEnum):
    """What an engine answers, by path."""

    CHAT = "/v1/chat/completions"
    CHAT_BATCH = "/v1/chat/completions/batch"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    COUNT_TOKENS = "/v1/messages/count_tokens"
    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"


@dataclass(frozen=True)
class Parameters:
    """What bodies may hold, as JSON schemas (https://json-schema.org)."""

    bodies: Mapping[Endpoint, Mapping[str, Any]]
    parts: Mapping[str, Any]
    """What the bodies' schemas refer to as `#/components/schemas/NAME`."""


class Engine(Protocol):
    """One base model, ready to answer. Methods raise EngineUnavailable once it is dead."""

    facts: BaseModelFacts
    dtype: str
    max_model_len: int

    @property
    def is_dead(self) -> bool:
        """True once it can answer no more."""
        ...

    @property
    def stats(self) -> EngineStats:
        """What it does now, and all that it did."""
        ...

    @property
    def stalled_seconds(self) -> float:
        """How long it has written nothing though it has requests; 0 when it has none."""
        ...

    async def load(
        self,
        name: str,
        folder: Path,
        *,
        template: str | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> LoadedAdapter:
        """Load a validated adapter between two steps. Raises AdapterRefused; then nothing of it is left."""
        ...

    async def remove(self, adapter: LoadedAdapter) -> None:
        """Remove an adapter that no request uses any more, and free its memory."""
        ...

    async def resident(self) -> set[int]:
        """The engine ids of all adapters held, asked from the workers themselves."""
        ...

    async def score(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], adapter: LoadedAdapter | None
    ) -> list[TokenScore]:
        """Score `token_ids` after `prompt_token_ids`, teacher-forced in one prefill: one score a token."""
        ...

    async def greedy(
        self, prompt_token_ids: Sequence[int], adapter: LoadedAdapter | None, max_tokens: int
    ) -> list[int]:
        """The likeliest tokens after a prompt, the end-of-text token included: at least one."""
        ...

    async def render(self, messages: Sequence[Mapping[str, Any]], adapter: LoadedAdapter | None) -> list[int]:
        """The token ids of a chat prompt, as a request would have them. Raises BadRequest."""
        ...

    async def tokenizer_info(self) -> dict[str, Any]:
        """The configuration of the base model's tokenizer, its chat template included; no path of the host."""
        ...

    def parameters(self) -> Parameters:
        """Of all endpoints. The first call takes half a second: make it in a thread."""
        ...

    async def answer(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        *,
        request_id: str,
        adapter: LoadedAdapter | None,
        fingerprint: str,
        observer: Observer,
    ) -> Answer:
        """Answer one request.

        A stream's first event has been awaited, so that what fails before it raises an ApiError here. What fails
        later is told by a last event, and then raised.
        """
        ...

    async def retrieve(
        self, response_id: str, *, stream: bool, starting_after: int | None
    ) -> dict[str, Any] | Events:
        """A stored response or its events, those after a sequence number. Raises ResponseNotFound, BadRequest."""
        ...

    async def cancel(self, response_id: str) -> dict[str, Any]:
        """End a response that is being made in the background. Raises ResponseNotFound, BadRequest."""
        ...

    async def delete(self, response_id: str) -> None:
        """Forget a stored response, and end it if it is being made. Raises ResponseNotFound."""
        ...

    async def close(self) -> None:
        """End the engine and its processes."""
        ...
