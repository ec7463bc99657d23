"""The states of a base model from start to failure, with fake engines."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from app.engine.base import Engine
from app.engine.supervisor import BaseStatus, Supervisor
from app.errors import EngineUnavailable
from tests.app.fake_engine import FakeEngine
from tests.app.lifecycle.rig import until

STARTING, PROVING, READY, RESTARTING, FAILED = BaseStatus


class Watched:
    """A supervisor whose builds and preparations the test controls."""

    def __init__(self) -> None:
        self.builds = asyncio.Queue[Engine | Exception]()
        self.preparations = asyncio.Queue[Exception | None]()
        self.deaths = 0
        self.readies = 0
        self.supervisor = Supervisor("tiny", self._build, stall_seconds=5)
        self.task: asyncio.Task[None] | None = None

    async def _build(self) -> Engine:
        engine = await self.builds.get()
        if isinstance(engine, Exception):
            raise engine
        return engine

    async def _prepare(self) -> None:
        if error := await self.preparations.get():
            raise error

    async def _died(self) -> None:
        self.deaths += 1

    def _ready(self) -> None:
        self.readies += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Watched"]:
        self.task = asyncio.create_task(
            self.supervisor.run(
                starting=asyncio.Lock(), prepare=self._prepare, on_ready=self._ready, on_death=self._died
            )
        )
        try:
            yield self
        finally:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    async def become(self, status: BaseStatus, phase: str) -> None:
        await until(
            lambda: (self.supervisor.state.status, self.supervisor.state.phase[:8]) == (status, phase)
        )

    async def start(self) -> FakeEngine:
        engine = FakeEngine()
        self.builds.put_nowait(engine)
        self.preparations.put_nowait(None)
        await until(lambda: self.supervisor.is_ready)
        return engine


def test_each_state_in_turn() -> None:
    async def check() -> None:
        async with Watched().running() as watched:
            supervisor = watched.supervisor
            await watched.become(STARTING, "starting")
            assert (supervisor.has_engine, supervisor.is_settled, supervisor.facts) == (False, False, None)
            with pytest.raises(EngineUnavailable, match=r"tiny is starting.*try again"):
                supervisor.check_ready()
            watched.builds.put_nowait(engine := FakeEngine())
            await watched.become(PROVING, "loading ")
            assert supervisor.engine is engine, "adapters are loaded into it"
            assert supervisor.facts == engine.facts
            with pytest.raises(EngineUnavailable, match="tiny is proving"):
                supervisor.check_ready()
            proving_since = supervisor.state.since
            watched.preparations.put_nowait(None)
            await watched.become(READY, "answerin")
            assert supervisor.state.since > proving_since
            supervisor.check_ready()

            engine.is_dead = True
            assert supervisor.state.status is RESTARTING, "the state must not wait for the watch loop"
            with pytest.raises(EngineUnavailable, match="tiny is restarting"):
                supervisor.check_ready()
            await watched.become(RESTARTING, "starting")
            assert (supervisor.is_settled, watched.deaths) == (True, 1)
            watched.builds.put_nowait(FakeEngine())
            await watched.become(RESTARTING, "loading ")
            watched.preparations.put_nowait(None)
            await watched.become(READY, "answerin")
            assert (watched.readies, supervisor.facts) == (2, engine.facts)

    asyncio.run(check())


@pytest.mark.parametrize("place", ["build", "prepare"])
def test_a_failed_first_start_is_final(place: str) -> None:
    async def check() -> None:
        async with Watched().running() as watched:
            if place == "build":
                watched.builds.put_nowait(ValueError("no such model"))
            else:
                watched.builds.put_nowait(FakeEngine())
                watched.preparations.put_nowait(ValueError("no such model"))
            assert watched.task
            with pytest.raises(ValueError, match="no such model"):
                await watched.task
            assert watched.supervisor.state.status is FAILED
            with pytest.raises(EngineUnavailable, match="could not be started") as caught:
                watched.supervisor.check_ready()
            assert "no such model" not in str(caught.value), "the reason may have host paths"
            assert "try again" not in str(caught.value)

    asyncio.run(check())


@pytest.mark.parametrize("failures", [2, 3])
def test_three_failed_rebuilds_in_a_row_are_final(failures: int) -> None:
    async def check() -> None:
        async with Watched().running() as watched:
            for _ in range(2):  # a success in between resets the count
                (await watched.start()).is_dead = True
                for _ in range(2):
                    watched.builds.put_nowait(OSError("out of memory"))
                if failures == 3:
                    break
            if failures == 3:
                watched.builds.put_nowait(OSError("out of memory"))
                assert watched.task
                with pytest.raises(OSError, match="out of memory"):
                    await watched.task
                assert watched.supervisor.state.status is FAILED
            else:
                await watched.start()

    asyncio.run(check())


def _dies(engine: FakeEngine) -> None:
    engine.is_dead = True


def _stalls(engine: FakeEngine) -> None:
    engine.stalled_seconds = 5.1


@pytest.mark.parametrize("end", [_dies, _stalls])
def test_an_engine_that_dies_or_stalls_is_closed_and_replaced(end: Callable[[FakeEngine], None]) -> None:
    async def check() -> None:
        async with Watched().running() as watched:
            end(first := await watched.start())
            await watched.become(RESTARTING, "starting")
            assert first.is_dead, "it was closed"
            assert await watched.start() is watched.supervisor.engine

    asyncio.run(check())
