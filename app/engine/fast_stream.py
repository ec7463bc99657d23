"""Plain streams: from the engine's tokens to bytes for the client, with no object of vLLM's for each token.

Most streams are plain: one answer, no logprobs, no parser. For each token of one, vLLM's server makes a
CompletionOutput, a RequestOutput, three pydantic models and their JSON, and hands them from generator to generator.
Here the text of a token goes straight to the stream it belongs to, which puts it between two halves of a chunk. The
halves come from vLLM's own models, so that a chunk has the fields it has there.
"""

import asyncio
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
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.metrics.stats import SchedulerStats

from app import errors
from app.engine.base import DONE, OnTokens
from app.engine.stats import EngineStats

_OBJECT: Final = "chat.completion.chunk"
_json = msgspec.json.Encoder().encode

# What stands in a chunk for what differs from stream to stream.
_ID, _CREATED, _MODEL, _ROLE, _TEXT, _REASON, _STOP = (
    '"<id>"', "8888888888", '"<model>"', '"<role>"', '"<text>"', '"<reason>"', '"<stop>"',
)  # fmt: skip


class Deltas:
    """What the engine wrote of one answer and nobody took yet. Takes the place of vLLM's queue of outputs."""

    __slots__ = ("_failure", "_loop", "_reader", "finish_reason", "stop_reason", "text", "tokens")

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()  # asking for it is a system call
        self._reader: asyncio.Future[None] | None = None

    def push(self, text: str, tokens: int, finish_reason: str | None, stop_reason: int | str | None) -> None:
        """Add what the engine wrote; a reader that is behind gets it together with what it has not taken yet."""
        self.text += text
        self.tokens += tokens
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self._wake()

    def put(self, output: Any) -> None:
        """What vLLM puts into its own queue: an error, or the end of an answer that was aborted."""
        if isinstance(output, Exception):
            self._failure = output
            self._wake()
        else:
            (one,) = output.outputs
            self.push(one.text, len(one.token_ids), one.finish_reason, one.stop_reason)

    def _wake(self) -> None:
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def wait(self) -> None:
        """Until there is something to take. Raises what broke the answer."""
        if not self.tokens and self.finish_reason is None and self._failure is None:
            self._reader = self._loop.create_future()
            await self._reader
        if self._failure is not None:
            raise self._failure

    def take(self) -> tuple[str, int]:
        """The text and the number of tokens since the last time."""
        taken = self.text, self.tokens
        self.text, self.tokens = "", 0
        return taken


@dataclass(slots=True)
class _Step:
    """One step of the engine, while its outputs are read. Times on the engine's clock, in seconds."""

    before: float = 0.0
    """When the step before had ended."""
    ended_at: float = 0.0
    read: int = 0
    """Tokens of prompts, those aside that were cached."""
    tokens: int = 0
    """Written."""
    went_on: int = 0
    """Answers that had begun before."""


def _adapter(state: RequestState) -> str:
    """The name of the adapter that answers, without its revision; empty for the base model."""
    return (state.lora_name or "").partition("@")[0]


class FastOutputProcessor(OutputProcessor):
    """vLLM's, with a short way for answers that somebody reads from Deltas; it knows when the engine last wrote."""

    def __init__(self, *arguments: Any, adapter_slots: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._progress_at = time.monotonic()
        self._stats = EngineStats(adapter_slots)
        self._step = _Step()

    def stats(self) -> EngineStats:
        """What the engine does now, and all that it did."""
        stats = self._stats
        states = self.request_states.values()
        if not states:  # the engine tells at its steps, and made none since those were aborted
            stats.running, stats.waiting, stats.kv_cache_usage = 0, 0, 0.0
        begun = frozenset(_adapter(state) for state in states if not (state.is_prefilling and stats.waiting))
        others = frozenset(_adapter(state) for state in states if state.is_prefilling and stats.waiting)
        stats.running_adapters, stats.waiting_adapters = begun - {""}, others - {""}
        return stats

    @property
    def stalled_seconds(self) -> float:
        """Since the engine last wrote, or got something to do."""
        return time.monotonic() - self._progress_at if self.request_states else 0.0

    def add_request(self, *arguments: Any, **options: Any) -> None:
        """See vLLM's."""
        if not self.request_states:
            self._progress_at = time.monotonic()
        super().add_request(*arguments, **options)

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        *arguments: Any,
        **options: Any,
    ) -> OutputProcessorOutput:
        """See vLLM's; called for every step of the engine, or more than once if that wrote to very many."""
        self._progress_at = time.monotonic()
        step = self._step
        step.ended_at = engine_core_timestamp or self._progress_at
        others, to_abort = [], []
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if state is None:
                continue  # it was aborted
            step.tokens += len(output.new_token_ids)
            step.went_on += 1
            if state.is_prefilling:
                self._began(state, output)
            if type(state.queue) is not Deltas:
                others.append((state, output))
            elif self._push(state, state.queue, output):
                to_abort.append(output.request_id)
        if not others:
            return OutputProcessorOutput(request_outputs=[], reqs_to_abort=to_abort)
        processed = super().process_outputs(
            [output for _, output in others], engine_core_timestamp, *arguments, **options
        )
        stopped = set(processed.reqs_to_abort)
        for state, output in others:
            if output.finish_reason is not None or output.request_id in stopped:
                self._ended(state, output.finish_reason or FinishReason.STOP)
        processed.reqs_to_abort += to_abort
        return processed

    def _began(self, state: RequestState, output: EngineCoreOutput) -> None:
        """Count an answer's first token."""
        step, read = self._step, output.prefill_stats
        step.went_on -= 1
        step.read += read.num_computed_tokens if read else state.prompt_len
        self._stats.prompt_tokens += state.prompt_len
        self._stats.first_token_seconds.add(time.time() - state.stats.arrival_time)

    def _ended(self, state: RequestState, reason: FinishReason) -> None:
        """Count an answer that is complete."""
        stats = self._stats
        stats.finished[str(reason)] += 1
        stats.answer_seconds.add(time.time() - state.stats.arrival_time)
        stats.request_prompt_tokens.add(state.prompt_len)
        stats.request_generation_tokens.add(state.detokenizer.num_output_tokens())

    def record(self, scheduler_stats: SchedulerStats | None, **_: Any) -> None:
        """Count a step. Called after its outputs, as the logger of a step that vLLM has in this place.

        Each answer that goes on got its last token from the step before, so that one count does for all. vLLM counts
        each for itself, and differs where an answer was preempted.
        """
        stats, step = self._stats, self._step
        if step.tokens:
            stats.generation_tokens += step.tokens
            stats.step_tokens.add(step.read + step.tokens)
            if step.went_on:
                stats.token_seconds.add(step.ended_at - step.before, step.went_on)
            self._step = _Step(before=step.ended_at)
        if scheduler_stats is not None:
            stats.running = scheduler_stats.num_running_reqs
            stats.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            stats.kv_cache_usage = scheduler_stats.kv_cache_usage
            stats.prefix_cache_queries += scheduler_stats.prefix_cache_stats.queries
            stats.prefix_cache_hits += scheduler_stats.prefix_cache_stats.hits

    def _push(self, state: RequestState, deltas: Deltas, output: EngineCoreOutput) -> bool:
        """Hand on what the engine wrote; whether it must be told that a stop string ended the answer."""
        if state.is_prefilling:
            state.is_prefilling = False
            if output.prefill_stats is not None:
                state.num_cached_tokens = output.prefill_stats.num_cached_tokens
                state.num_cache_creation_tokens = output.prefill_stats.num_cache_creation_tokens
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        detokenizer: Any = state.detokenizer
        token_ids = detokenizer.token_ids
        before = len(token_ids)
        stop_string = detokenizer.update(output.new_token_ids, finish_reason == FinishReason.STOP)
        if stop_string is not None:
            finish_reason, stop_reason = FinishReason.STOP, stop_string
        text = detokenizer.get_next_output_text(finish_reason is not None, True)
        tokens = len(token_ids) - before
        if finish_reason is None:
            if tokens:  # not so while a long prompt is read in parts
                deltas.push(text, tokens, None, None)
            return False
        deltas.push(text, tokens, str(finish_reason), stop_reason)
        self._ended(state, finish_reason)
        self._finish_request(state)
        return not output.finished


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

    async def outputs(self, on_tokens: OnTokens) -> AsyncGenerator[RequestOutput, None]:
        """Hand it to the engine, and read what vLLM makes of what it writes."""
        request_id, prompt, sampling_params = self._arguments
        is_first = True
        async for output in self._llm.generate(prompt, sampling_params, request_id, **self._options):
            new_tokens = sum(len(one.token_ids) for one in output.outputs)
            on_tokens(len(output.prompt_token_ids or ()) if is_first else 0, new_tokens)
            is_first = False
            for one in output.outputs:
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
    on_tokens: OnTokens,
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
        on_tokens(generation.prompt_tokens, tokens)
        total = tokens
        ready = (head + shapes.role.replace(_ROLE, _text(role))).encode()
        has_begun = True
        while deltas.finish_reason is None:
            yield b"".join((ready, before, _json(text), after))
            ready = b""
            await deltas.wait()
            _raise_if_error(deltas)
            text, tokens = deltas.take()
            on_tokens(0, tokens)
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
