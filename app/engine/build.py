"""From options to a running engine, off the event loop."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from app.engine.base import Engine

if TYPE_CHECKING:
    from app.engine.vllm import VllmEngine

T = TypeVar("T")


@dataclass(frozen=True)
class EngineOptions:
    """What one engine is built with; the same names and meanings as the settings."""

    model: str
    name: str
    dtype: str
    max_model_len: int | None
    max_num_seqs: int
    max_lora_rank: int
    max_loras: int
    max_resident: int
    kv_cache_gib: int
    gpu_memory_utilization: float
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    stored_responses: int = 0
    truncates: bool = False
    control_tokens: str = "text"
    max_logprobs: int = 20
    return_tokens_as_token_ids: bool = False
    always_usage: bool = False


async def build_engine(options: EngineOptions) -> Engine:
    """An engine that is up; no adapter is loaded. Takes 5 to 50 seconds.

    Raises ValueError when the model cannot be served, and what vLLM raises when the engine does not come up.
    """

    def build() -> "VllmEngine":
        # Imported late and here: it takes ten seconds, in which health can be asked already.
        from app.engine.vllm import VllmEngine  # noqa: PLC0415

        return VllmEngine.build(options)

    engine = await _in_daemon_thread(build)
    await engine.start()
    return engine


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """Run something slow without blocking the loop, and without the process waiting for it at exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not future.done():
            set_outcome()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # handed to whoever awaits
            failure = error
            loop.call_soon_threadsafe(settle, lambda: future.set_exception(failure))
        else:
            loop.call_soon_threadsafe(settle, lambda: future.set_result(result))

    threading.Thread(target=work, name="build", daemon=True).start()
    return await future
