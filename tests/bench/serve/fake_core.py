"""An API server of either side over an engine core without a model.

    python -m tests.bench.serve.fake_core ours serve
    python -m tests.bench.serve.fake_core stock --model FOLDER ...

Starts what `python -m app` and `vllm serve` start, with nothing replaced but the client of the engine core, whose
outputs vLLM's own AsyncLLM takes in, turns into text and hands to the streams. Each request gets one token a step, and
a step takes 40 ms: long enough that no side falls behind and merges tokens.
"""

import asyncio
import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

MODULES = {"ours": "app", "stock": "vllm.entrypoints.launchers.api_server.entry"}
_STEP_SECONDS = 0.04
_TEXT = "Gout causes sudden severe pain, redness and swelling, most often in the big toe. "


@dataclass(slots=True)
class _Running:
    request: EngineCoreRequest
    made: int = 0


class FakeCore:
    """As much of AsyncMPClient as AsyncLLM and the two servers ask for."""

    engine_ranks_managed = (0,)

    def __init__(self, tokenizer: Any) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        self._tokens: list[int] = tokenizer.encode(_TEXT, add_special_tokens=False)
        self._running: dict[str, _Running] = {}
        self._is_asked = asyncio.Event()
        self._next_step = 0.0

    async def get_output_async(self) -> EngineCoreOutputs:
        """The outputs of one step, when its time has come."""
        while not self._running:
            self._is_asked.clear()
            await self._is_asked.wait()
        now = time.perf_counter()
        self._next_step = max(self._next_step + _STEP_SECONDS, now)
        await asyncio.sleep(self._next_step - now)
        return EngineCoreOutputs(outputs=[self._output(one) for one in [*self._running.values()]])

    def _output(self, one: _Running) -> EngineCoreOutput:
        request, parameters = one.request, one.request.sampling_params
        token = self._tokens[one.made % len(self._tokens)]
        output = EngineCoreOutput(request.request_id, [token])
        if parameters.logprobs is not None:
            output.new_logprobs = LogprobsLists(*_certain([token], 1 + parameters.logprobs))
        if parameters.prompt_logprobs is not None and one.made == 0:
            of_prompt = _certain(request.prompt_token_ids[1:], 1 + parameters.prompt_logprobs)
            output.new_prompt_logprobs_tensors = LogprobsTensors(*map(torch.from_numpy, of_prompt))
        one.made += 1
        if one.made == parameters.max_tokens:
            output.finish_reason = FinishReason.LENGTH
            del self._running[request.request_id]
        return output

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self._running[request.request_id] = _Running(request)
        self._is_asked.set()

    async def abort_requests_async(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def collective_rpc_async(self, _method: str, *_: Any) -> list[Any]:
        return [{}]  # of one worker: no LoRA-capable modules, no adapters

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is none."""

    def shutdown(self, timeout: float | None = None) -> None:
        """There is nothing to end."""


def _certain(tokens: Sequence[int], width: int) -> tuple[Any, Any, Any]:
    """Ids, log-probabilities and ranks of tokens that nothing else could have been."""
    ids = np.repeat(np.array(tokens, dtype=np.int64)[:, None], width, axis=1)
    return ids, np.zeros(ids.shape, dtype=np.float32), np.ones(len(tokens), dtype=np.int64)


def _make(*_: Any, renderer: Any, **__: Any) -> FakeCore:
    return FakeCore(renderer.tokenizer)


if __name__ == "__main__":
    EngineCoreClient.make_async_mp_client = staticmethod(_make)
    side = sys.argv.pop(1)
    runpy.run_module(MODULES[side], run_name="__main__", alter_sys=True)
