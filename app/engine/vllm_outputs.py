"""The engine's output of each step: pass it to the requests, and count it."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.metrics.stats import SchedulerStats

from app.engine.stats import EngineStats


class Deltas:
    """The output of one answer that was not read yet. Replaces vLLM's output queue."""

    __slots__ = ("_failure", "_loop", "_reader", "finish_reason", "stop_reason", "text", "tokens")

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._failure: Exception | None = None
        self._loop = asyncio.get_running_loop()  # cached, since getting it is a system call
        self._reader: asyncio.Future[None] | None = None

    def push(self, text: str, tokens: int, finish_reason: str | None, stop_reason: int | str | None) -> None:
        """Add output; a slow reader gets it together with earlier unread output."""
        self.text += text
        self.tokens += tokens
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        self._wake()

    def put(self, output: Any) -> None:
        """Add an item as vLLM puts it into its own queue: an error, or the end of an aborted answer."""
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
        """Wait for output. Raises the error that ended the answer."""
        if not self.tokens and self.finish_reason is None and self._failure is None:
            self._reader = self._loop.create_future()
            await self._reader
        if self._failure is not None:
            raise self._failure

    def take(self) -> tuple[str, int]:
        """Return the text and the number of tokens since the last call."""
        taken = self.text, self.tokens
        self.text, self.tokens = "", 0
        return taken


@dataclass(slots=True)
class _Step:
    """One step of the engine, while its outputs are processed. Times are those of the engine's clock, in seconds."""

    before: float = 0.0
    """End of the previous step."""
    ended_at: float = 0.0
    read: int = 0
    """Prompt tokens, without cached ones."""
    tokens: int = 0
    """Generated tokens."""
    went_on: int = 0
    """Answers that started in an earlier step."""


def _adapter(state: RequestState) -> str:
    """Return the name of the request's adapter, without its revision; empty for the base model."""
    return (state.lora_name or "").partition("@")[0]


class FastOutputProcessor(OutputProcessor):
    """vLLM's output processor, with a fast path for answers read from Deltas; tracks when output last arrived."""

    def __init__(self, *arguments: Any, adapter_slots: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._progress_at = time.monotonic()
        self._stats = EngineStats(adapter_slots)
        self._step = _Step()

    def stats(self) -> EngineStats:
        """See Engine.stats."""
        stats = self._stats
        states = self.request_states.values()
        if not states:  # the engine reports only at its steps, and made none since its requests were aborted
            stats.running, stats.waiting, stats.kv_cache_usage = 0, 0, 0.0
        begun = frozenset(_adapter(state) for state in states if not (state.is_prefilling and stats.waiting))
        others = frozenset(_adapter(state) for state in states if state.is_prefilling and stats.waiting)
        stats.running_adapters, stats.waiting_adapters = begun - {""}, others - {""}
        return stats

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the engine's last output, or since its first pending request; 0 if there are none."""
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
        """See vLLM's; called for every step, or several times for a step with very many outputs."""
        self._progress_at = time.monotonic()
        step = self._step
        step.ended_at = engine_core_timestamp or self._progress_at
        others, to_abort = [], []
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if state is None:
                continue  # aborted
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
        """Count a finished answer."""
        stats = self._stats
        stats.finished[str(reason)] += 1
        stats.answer_seconds.add(time.time() - state.stats.arrival_time)
        stats.request_prompt_tokens.add(state.prompt_len)
        stats.request_generation_tokens.add(state.detokenizer.num_output_tokens())

    def record(self, scheduler_stats: SchedulerStats | None, **_: Any) -> None:
        """Count a step. Called after its outputs, in place of vLLM's stat logger.

        Every running answer got its last token in the previous step, so one duration is counted for all of them. vLLM
        counts each answer separately, with a different result if one was preempted.
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
        """Pass output on; return whether the engine must abort the request because a stop string ended the answer."""
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
            if tokens:  # none while a long prompt is read in parts
                deltas.push(text, tokens, None, None)
            return False
        deltas.push(text, tokens, str(finish_reason), stop_reason)
        self._ended(state, finish_reason)
        self._finish_request(state)
        return not output.finished
