"""Keeps an engine running: builds it off the event loop, watches it, and builds another when it dies."""

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from adapters import BaseModelFacts
from app.engine.base import Engine
from app.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25
_SAY_SECONDS = 5
_MAX_FAILURES = 3
"""Engines in a row that never became ready before the supervisor gives up."""

_BUILDING = "starting the engine (10 to 60 seconds)"
_PROVING = "loading and proving adapters"
_ANSWERING = "answering requests"
_STOPPING = "stopping the engine"
_GIVEN_UP = "could not be started; the service's log says why"


class BaseStatus(StrEnum):
    """Where a base model stands. It answers requests while it is READY, and only then."""

    STARTING = "starting"
    """Its first engine is being built."""
    PROVING = "proving"
    """Its first engine is up; adapters are being loaded and proved."""
    READY = "ready"
    RESTARTING = "restarting"
    """It has been ready; its engine died, and another is being built and filled."""
    FAILED = "failed"
    """It cannot be started. Nothing but a restart of the service changes that."""


@dataclass(frozen=True)
class BaseState:
    """A base model's state, and since when it is in it."""

    status: BaseStatus
    phase: str
    """What happens now, in words for operators."""
    since: float
    """Of this phase, in seconds since the epoch."""


class Supervisor:
    """One for each base model; `run` it as a task. The only writer of the base model's state."""

    def __init__(self, name: str, build: Callable[[], Awaitable[Engine]], *, stall_seconds: float) -> None:
        """`stall_seconds`: an engine that has requests and has written nothing for so long is taken for dead."""
        self.facts: BaseModelFacts | None = None
        """Known from when the first engine is up."""
        self._name = name
        self._build = build
        self._stall_seconds = stall_seconds
        self._engine: Engine | None = None
        self._state = BaseState(BaseStatus.STARTING, _BUILDING, time.time())

    @property
    def state(self) -> BaseState:
        """The state now. An engine that has died ends READY at once, before the watch sees it."""
        if self._state.status is BaseStatus.READY and not self.has_engine:
            self._enter(BaseStatus.RESTARTING, _STOPPING)
        return self._state

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered now."""
        return self.state.status is BaseStatus.READY

    @property
    def is_settled(self) -> bool:
        """Whether the first start is over: it has been ready, or never will be."""
        return self.state.status not in (BaseStatus.STARTING, BaseStatus.PROVING)

    @property
    def has_engine(self) -> bool:
        """Whether there is an engine that lives, be it ready or not."""
        return self._engine is not None and not self._engine.is_dead

    @property
    def engine(self) -> Engine:
        """The live engine, which is there before requests can be answered. Raises EngineUnavailable."""
        if not self.has_engine:
            raise self._unavailable()
        return cast(Engine, self._engine)

    def check_ready(self) -> None:
        """Raises EngineUnavailable while requests cannot be answered."""
        if not self.is_ready:
            raise self._unavailable()

    def _unavailable(self) -> EngineUnavailable:
        state = self.state
        again = "" if state.status is BaseStatus.FAILED else "; try again in a moment"
        return EngineUnavailable(f"the base model {self._name} is {state.status}: {state.phase}{again}")

    def _enter(self, status: BaseStatus, phase: str) -> None:
        self._state = BaseState(status, phase, time.time())

    async def run(
        self,
        *,
        starting: asyncio.Lock,
        prepare: Callable[[], Awaitable[None]],
        on_ready: Callable[[], None],
        on_death: Callable[[], Awaitable[None]],
    ) -> None:
        """Run until cancelled. `starting` is held while an engine is built; `prepare` runs before requests come.

        Raises what the build raised: at once if the very first fails, since that is a wrong setting, and
        after three in a row later.
        """
        saying = asyncio.create_task(self._say_what_is_waited_for())
        failures = 0
        try:
            while True:
                try:
                    await self._live_once(starting, prepare, on_ready, on_death)
                    failures = 0
                except Exception:
                    failures += 1
                    if not self.is_settled or failures == _MAX_FAILURES:
                        self._enter(BaseStatus.FAILED, _GIVEN_UP)
                        raise
                    logger.exception("the engine could not be rebuilt (%d of %d)", failures, _MAX_FAILURES)
        finally:
            saying.cancel()

    async def _live_once(
        self,
        starting: asyncio.Lock,
        prepare: Callable[[], Awaitable[None]],
        on_ready: Callable[[], None],
        on_death: Callable[[], Awaitable[None]],
    ) -> None:
        """Build an engine and return when it has died, or makes no progress any more."""
        again = BaseStatus.RESTARTING if self.is_settled else None
        self._enter(again or BaseStatus.STARTING, _BUILDING)
        async with starting:
            engine = await self._build()
        try:
            self._engine, self.facts = engine, engine.facts
            self._enter(again or BaseStatus.PROVING, _PROVING)
            await prepare()
            _spare_collections()
            self._enter(BaseStatus.READY, _ANSWERING)
            again = BaseStatus.RESTARTING
            on_ready()
            # vLLM has no event for either.
            while not engine.is_dead and engine.stalled_seconds < self._stall_seconds:  # noqa: ASYNC110
                await asyncio.sleep(_WATCH_SECONDS)
            why = "died" if engine.is_dead else f"has written nothing for {self._stall_seconds:g} s"
            logger.error("the engine of %s %s; building another", self._name, why)
        finally:
            self._engine = None
            self._enter(again or BaseStatus.STARTING, _STOPPING)
            await on_death()
            await engine.close()

    async def _say_what_is_waited_for(self) -> None:
        while True:
            if not self.is_ready:
                logger.info("%s is %s: %s", self._name, self.state.status, self.state.phase)
            await asyncio.sleep(_SAY_SECONDS)


def _spare_collections() -> None:
    """What is there now stays: a full collection that walked through it would stall every stream."""
    gc.unfreeze()  # of an engine before this one
    gc.collect()
    gc.freeze()
