"""The life cycle of adapters on fake engines: a store, base models, reconciler and operations."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters import AdapterStore, BaseModelFacts
from app.engine.base import Engine
from app.engine.supervisor import Supervisor
from app.lifecycle.bases import Base, Bases
from app.lifecycle.loader import Loader
from app.lifecycle.operations import Operations
from app.lifecycle.reconciler import Reconciler
from app.lifecycle.residency import Limits, Residency
from app.lifecycle.served_models import ServedModels
from app.lifecycle.transitions import Transitions
from app.metrics import Metrics
from tests.adapters.folders import BASE
from tests.app.fake_engine import FakeEngine

WHO: dict[str, Any] = {"actor": "test", "why": ""}


class Rig:
    """The composition of app.main without a web server. Tests start the engines."""

    def __init__(
        self,
        folder: Path,
        facts: Sequence[BaseModelFacts] = (BASE,),
        *,
        max_resident: int = 3,
        allow_revisions: bool = False,
    ) -> None:
        self.store = AdapterStore(folder / "store")
        self.metrics = Metrics()
        self.served = ServedModels([one.name for one in facts])
        self._folder = folder
        self._limits = Limits(
            max_resident=max_resident, max_resident_bytes=2**30, max_loras=max_resident - 1, wait_seconds=10
        )
        self._allow_revisions = allow_revisions
        self._engines = {one.name: asyncio.Queue[FakeEngine | Exception]() for one in facts}
        self.bases = Bases([self._base(one.name) for one in facts])
        transitions = Transitions(self.store, self.served, self.bases)
        self.reconciler = Reconciler(self.store, self.served, self.bases, transitions, interval=0.01)
        self.operations = Operations(
            self.store, self.bases, transitions, self.metrics, allow_revisions=allow_revisions
        )
        self.has_given_up = False

    def _base(self, name: str) -> Base:
        async def build() -> Engine:
            engine = await self._engines[name].get()
            if isinstance(engine, Exception):
                raise engine
            return engine

        supervisor = Supervisor(name, build, stall_seconds=10)
        loader = Loader(
            self.store, self.metrics, recorded_dir=self._folder / "recorded", allow_unproven=False
        )
        residency = Residency(
            self.store, self.metrics, self._limits, loader,
            engine=lambda: supervisor.engine,
            answers=lambda ref: self._allow_revisions or self.served.is_answering(ref),
            is_wanted=lambda ref: self._allow_revisions or self.served.is_wanted(ref),
        )  # fmt: skip
        return Base(name, supervisor, residency)

    @property
    def base(self) -> Base:
        """The first base model."""
        return next(iter(self.bases))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        """Follow the store, and supervise the engines."""

        def give_up() -> None:
            self.has_given_up = True

        keeping = self.bases.run(
            attach=self.reconciler.attach,
            detach=self.reconciler.detach,
            on_start=self.metrics.engine_starts.inc,
            on_settled=lambda: None,
            on_give_up=give_up,
        )
        tasks = [asyncio.create_task(keeping), asyncio.create_task(self.reconciler.run())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def give(self, name: str, engine: FakeEngine | Exception) -> None:
        """Let the next engine of a base model start or fail."""
        self._engines[name].put_nowait(engine)

    async def start(self, name: str, engine: FakeEngine) -> None:
        """Let an engine start, and wait until it is ready."""
        self.give(name, engine)
        supervisor = self.bases.named(name).supervisor
        await until(lambda: supervisor.has_engine and supervisor.engine is engine and supervisor.is_ready)

    def statuses(self) -> dict[str, str]:
        """Return the status of every alias, by `name` for `default` and else by `name@alias`."""
        return {
            name if alias == "default" else f"{name}@{alias}": str(self.reconciler.status(name, known))
            for (name, alias), known in self.served.aliases()
        }

    async def become(self, **statuses: str) -> None:
        """Wait until the aliases have these statuses."""
        await until(lambda: self.statuses() == statuses)


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110 - nothing here has an event
            await asyncio.sleep(0.01)
