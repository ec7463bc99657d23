"""Keeps an engine running: builds it off the event loop, watches it, and builds another when it dies."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from app.engine.base import Engine
from app.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25
_SAY_SECONDS = 5
_ENGINE = "the engine to start (10 to 60 seconds)"
_MAX_FAILURES = 3
"""Engines in a row that never became ready before the supervisor gives up."""

T = TypeVar("T")


class Supervisor:
    """One for each base model; `run` it as a task. `engine` is there while requests can be answered."""

    def __init__(
        self,
        build: Callable[[], Awaitable[Engine]],
        *,
        prepare: Callable[[Engine], Awaitable[None]],
        on_ready: Callable[[], None],
        on_death: Callable[[], Awaitable[None]],
        stall_seconds: float,
    ) -> None:
        """`stall_seconds`: an engine that has requests and has written nothing for so long is taken for dead."""
        self.waiting_for = _ENGINE
        self._engine: Engine | None = None
        self._build = build
        self._prepare = prepare
        self._on_ready = on_ready
        self._on_death = on_death
        self._stall_seconds = stall_seconds

    @property
    def engine(self) -> Engine:
        """The live engine. Raises EngineUnavailable."""
        self.check_ready()
        return cast(Engine, self._engine)

    def check_ready(self) -> None:
        """Raises EngineUnavailable while requests cannot be answered."""
        if not self.is_ready:
            raise EngineUnavailable(f"waiting for {self.waiting_for}; try again in a moment")

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered now."""
        return self._engine is not None and not self._engine.is_dead

    async def run(self) -> None:
        """Run until cancelled.

        Raises what the build raised: at once if the very first fails, since that is a wrong setting, and
        after three in a row later.
        """
        saying = asyncio.create_task(self._say_what_is_waited_for())
        failures, has_been_ready = 0, False
        try:
            while True:
                try:
                    await self._live_once()
                    failures, has_been_ready = 0, True
                except Exception:
                    failures += 1
                    if not has_been_ready or failures == _MAX_FAILURES:
                        raise
                    logger.exception("the engine could not be rebuilt (%d of %d)", failures, _MAX_FAILURES)
        finally:
            saying.cancel()

    async def _live_once(self) -> None:
        """Build an engine and return when it has died, or makes no progress any more."""
        self.waiting_for = _ENGINE
        engine = await self._build()
        try:
            self.waiting_for = "adapters to be loaded and proved"
            await self._prepare(engine)
            self._engine = engine
            self._on_ready()
            # vLLM has no event for either.
            while not engine.is_dead and engine.stalled_seconds < self._stall_seconds:  # noqa: ASYNC110
                await asyncio.sleep(_WATCH_SECONDS)
            why = "died" if engine.is_dead else f"has written nothing for {self._stall_seconds:g} s"
            logger.error("the engine %s; building another", why)
        finally:
            self._engine = None
            self.waiting_for = "the engine to stop"
            await self._on_death()
            await engine.close()

    async def _say_what_is_waited_for(self) -> None:
        while True:
            if not self.is_ready:
                logger.info("waiting for %s", self.waiting_for)
            await asyncio.sleep(_SAY_SECONDS)


async def in_daemon_thread(function: Callable[[], T]) -> T:
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
