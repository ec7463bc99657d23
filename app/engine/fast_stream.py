"""Plain streams: from the engine's tokens to bytes for the client, with no object of vLLM's for each token.

Most streams are plain: one answer, no logprobs, no parser. For each token of one, vLLM's server makes a
CompletionOutput, a RequestOutput, three pydantic models and their JSON, and hands them from generator to generator.
Here the text of a token goes straight to the stream it belongs to, which puts it between two halves of a chunk. The
halves come from vLLM's own models, so that a chunk has the fields it has there.
"""

import functools
import json
import time
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo
from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestState

from app import errors
from app.engine.base import DONE, Observer
from app.engine.vllm_outputs import Deltas

_OBJECT: Final = "chat.completion.chunk"
_json = msgspec.json.Encoder().encode

# What stands in a chunk for what differs from stream to stream.
_ID, _CREATED, _MODEL, _ROLE, _TEXT, _REASON, _STOP = (
    '"<id>"', "8888888888", '"<model>"', '"<role>"', '"<text>"', '"<reason>"', '"<stop>"',
)  # fmt: skip


class Generation:
    """One call of `AsyncLLM.generate` that has not begun: as vLLM's outputs, or as deltas."""

    def __init__(
        self,
        llm: AsyncLLM,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        options: dict[str, Any],
        stop: Collection[str | int] = (),
    ) -> None:
        """`stop`: what ends the answer as the model's own last token does, and is no client's stop string."""
        self.prompt_tokens = 0
        self._stop = stop
        self._llm = llm
        self._arguments = (request_id, prompt, sampling_params)
        self._options = options
        self._internal_id = ""
        self._state: RequestState | None = None

    @property
    def cached(self) -> PromptTokenUsageInfo:
        """How many of the prompt's tokens the engine had read before; known when the first is generated."""
        state = self._state
        return PromptTokenUsageInfo(
            cached_tokens=state.num_cached_tokens if state else 0,
            created_cache_tokens=state.num_cache_creation_tokens if state else 0,
        )

    async def begin(self) -> Deltas:
        """Hand it to the engine. Raises what vLLM's own method raises."""
        queue = await self._llm.add_request(*self._arguments, **self._options)
        deltas = Deltas()
        self._internal_id = queue.request_id
        early = queue.get_nowait()
        if early is not None:
            deltas.put(early)
        state = self._llm.output_processor.request_states.get(queue.request_id)
        if state is not None:
            self._state = state
            state.queue = deltas
            self.prompt_tokens = state.prompt_len
        return deltas

    async def outputs(self, observer: Observer, first_choice: int) -> AsyncGenerator[RequestOutput, None]:
        """Hand it to the engine, and read what vLLM makes of what it writes. Choices count from `first_choice`."""
        request_id, prompt, sampling_params = self._arguments
        is_first = True
        async for output in self._llm.generate(prompt, sampling_params, request_id, **self._options):
            if is_first:
                observer.read(len(output.prompt_token_ids or ()))
                is_first = False
            for one in output.outputs:
                observer.wrote(first_choice + one.index, one.text, len(one.token_ids))
                one.stop_reason = self.stop_reason(one.stop_reason)
            yield output

    def stop_reason(self, found: int | str | None) -> int | str | None:
        """What the client is told of what ended the answer."""
        return None if found in self._stop else found

    async def abort(self) -> None:
        """Nobody reads it any more."""
        await self._llm.abort(self._internal_id, internal=True)


def is_plain(request: ChatCompletionRequest) -> bool:
    """Whether the answer is one stream of text and of nothing else."""
    return bool(
        request.stream
        and (request.n or 1) == 1
        and not request.logprobs
        and not request.echo
        and not request.return_token_ids
        and not request.return_prompt_text
        and not request.use_beam_search
        and not request.stream_interval
        and not (request.stream_options and request.stream_options.continuous_usage_stats)
    )


@dataclass(frozen=True)
class _Shapes:
    """Chunks as vLLM's models write them, cut where something is put in."""

    head: str
    """Of all, up to the choices."""
    role: str
    delta: tuple[str, str]
    """Before and after the text."""
    last: str
    """Without what closes it."""


@functools.cache
def _shapes() -> _Shapes:
    def chunk(delta: DeltaMessage, of_choice: dict[str, Any], **more: Any) -> tuple[str, str]:
        choice = ChatCompletionResponseStreamChoice(index=0, delta=delta, logprobs=None, **of_choice)
        made = ChatCompletionStreamResponse(
            id=_ID[1:-1], object=_OBJECT, created=int(_CREATED), choices=[choice], model=_MODEL[1:-1], **more
        )
        head, choices, tail = made.model_dump_json(exclude_unset=True).partition('"choices":')
        return f"data: {head}{choices}", tail

    text = DeltaMessage(content=_TEXT[1:-1])
    head, delta = chunk(text, {"finish_reason": None, "token_ids": None})
    before, after = delta.split(_TEXT)
    ended = {"finish_reason": _REASON[1:-1], "stop_reason": _STOP[1:-1], "token_ids": None}
    first = DeltaMessage(role=_ROLE[1:-1], content="")
    nothing = {"prompt_token_ids": None, "prompt_text": None}
    return _Shapes(
        head=head,
        role=chunk(first, {"finish_reason": None}, **nothing)[1] + "\n\n",
        delta=(before, after + "\n\n"),
        last=chunk(text, ended)[1].removesuffix("}"),
    )


def _text(value: Any) -> str:
    return _json(value).decode()


async def chat_chunks(
    request: ChatCompletionRequest,
    generation: Generation,
    request_id: str,
    model_name: str,
    *,
    role: str,
    fingerprint: str,
    observer: Observer,
    translated: Callable[[Exception], errors.ApiError],
) -> AsyncGenerator[bytes]:
    """The chunks of a plain stream, ready to send: together what there is at a time.

    What breaks it is raised as it is `translated`, after an error event if it had begun.
    """
    shapes = _shapes()
    head = shapes.head.replace(_CREATED, str(int(time.time())))
    head = head.replace(_ID, _text(request_id)).replace(_MODEL, _text(model_name))
    has_begun = is_over = False
    try:
        deltas = await generation.begin()
        await deltas.wait()
        _raise_if_error(deltas)
        before, after = ((head + shapes.delta[0]).encode(), shapes.delta[1].encode())
        text, tokens = deltas.take()
        observer.read(generation.prompt_tokens)
        observer.wrote(0, text, tokens)
        total = tokens
        ready = (head + shapes.role.replace(_ROLE, _text(role))).encode()
        has_begun = True
        while deltas.finish_reason is None:
            yield b"".join((ready, before, _json(text), after))
            ready = b""
            await deltas.wait()
            _raise_if_error(deltas)
            text, tokens = deltas.take()
            observer.wrote(0, text, tokens)
            total += tokens
        is_over = True
        last = head + shapes.last.replace(_REASON, _text(deltas.finish_reason)).replace(
            _STOP, _text(generation.stop_reason(deltas.stop_reason))
        ).replace(_TEXT, _text(text))
        of_last = f',"system_fingerprint":{_text(fingerprint)}'
        if request.stream_options and request.stream_options.include_usage:
            usage = UsageInfo(
                prompt_tokens_details=generation.cached,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=total,
                total_tokens=generation.prompt_tokens + total,
            )
            last += f'}}\n\n{head}[],"usage":{usage.model_dump_json()}'
        yield b"".join((ready, last.encode(), of_last.encode(), b"}\n\n", DONE))
    except Exception as error:  # vLLM raises its own and built-in errors alike
        is_over = True
        failure = translated(error)
        if has_begun:
            yield f"data: {json.dumps(errors.body(failure))}\n\n".encode()
        raise failure from error
    finally:
        if not is_over:  # the client left
            await generation.abort()


def _raise_if_error(deltas: Deltas) -> None:
    if deltas.finish_reason == "error":
        raise GenerationError("Internal server error")
