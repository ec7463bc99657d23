"""Which revisions the engine holds: loads on demand, proves what it loads, and makes room.

There may be far more adapters than fit. A request holds its revision by a lease; what nobody holds may
leave, the least recently used first, or at once when no alias points at it any more, nor would after a
rollback. Loading happens between two engine steps, one adapter at a time, and never because a step needed it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from adapters import AdapterError, AdapterStore, Manifest
from app.engine.base import Engine, LoadedAdapter
from app.errors import AdapterRefused, AdapterUnavailable, ApiError, EngineUnavailable, code_of
from app.lifecycle.loader import Loader
from app.lifecycle.turns import Turns
from app.metrics import Metrics

logger = logging.getLogger(__name__)

_SERIES_SECONDS = 600.0
"""The metrics of a revision that left for good are there for some scrapes more, and then end."""

RETRY_SECONDS = 30.0
"""A revision that failed is not loaded again by requests before this, nor by the reconciler."""


class RevisionStatus(StrEnum):
    """Where a revision stands in one engine."""

    LOADING = "loading"
    """It is being read, checked and handed to the engine."""
    PROVING = "proving"
    """The engine has it; it is being held against its golden prompts."""
    READY = "ready"
    """It is loaded and proved."""
    DRAINING = "draining"
    """No new request goes to it: it leaves with its last one, or is kept for a rollback."""


@dataclass(frozen=True)
class Limits:
    """How much the engine may hold."""

    max_resident: int
    max_resident_bytes: int
    """Of adapter files, which take about as much memory in the engine."""
    max_loras: int
    """Adapters that may have requests in the engine at once."""
    wait_seconds: float


@dataclass(eq=False)
class Resident:
    """A revision the engine holds."""

    manifest: Manifest
    loaded: LoadedAdapter
    size: int
    """Bytes of its tensors on disk."""
    held: ExitStack
    """The hold on its files, which keeps them from being pruned."""
    last_used: float = field(default_factory=time.time)


class Lease:
    """A request's hold on what answers it, one revision or the base model; a context manager."""

    def __init__(self, engine: Engine, resident: Resident | None, held: ExitStack) -> None:
        self.engine = engine
        self.manifest = resident.manifest if resident else None
        self.adapter = resident.loaded if resident else None
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


class Residency:
    """What one base model's engine holds. It outlives the engine: `clear` it when that has died."""

    def __init__(
        self,
        store: AdapterStore,
        metrics: Metrics,
        limits: Limits,
        loader: Loader,
        *,
        engine: Callable[[], Engine],
        answers: Callable[[str], bool],
        is_wanted: Callable[[str], bool],
    ) -> None:
        """`engine` gives the live engine, or raises EngineUnavailable. `answers` says of a ref whether new requests
        may go to it, `is_wanted` whether it may stay when nobody holds it.
        """
        self.limits = limits
        self.has_line = asyncio.Event()
        """Set when somebody has to wait; who only uses what is free clears it and gives way when it is set."""
        self._store = store
        self._metrics = metrics
        self._loader = loader
        self._live_engine = engine
        self._answers = answers
        self._is_wanted = is_wanted
        self._residents: dict[str, Resident] = {}
        self._loads: dict[str, asyncio.Task[Resident]] = {}
        self._proving: set[str] = set()
        self._failures: dict[str, tuple[Exception, float]] = {}
        self._loading = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

        # Entered in this order, so that two can never wait for each other.
        self._bytes = Turns(limits.max_resident_bytes, on_line=self.has_line.set)
        self._places = Turns(limits.max_resident, on_line=self.has_line.set)
        self._slots = Turns(limits.max_loras, on_line=self.has_line.set)

    async def clear(self) -> None:
        """The engine is gone, and all it held."""
        for turns in (self._bytes, self._places, self._slots):
            turns.dismiss(
                EngineUnavailable("the engine stopped and is being restarted; try again in a moment")
            )
        await asyncio.gather(*self._loads.values(), *self._leaving, return_exceptions=True)
        for resident in self._residents.values():
            resident.held.close()
        self._residents.clear()
        self._failures.clear()
        self._loader.forget()

    # Leases

    async def lease(self, manifest: Manifest | None) -> Lease:
        """Lease a revision for one request, loaded if need be and with a slot of the engine; None: the base.

        Raises AdapterUnavailable: its turn did not come in time, or it cannot be loaded. EngineUnavailable.
        """
        if manifest is None:
            return Lease(self._live_engine(), None, ExitStack())
        ref = manifest.ref
        with ExitStack() as held:
            try:
                resident = await self._enter_and_load(manifest, held)
            except (AdapterUnavailable, EngineUnavailable):
                raise
            except Exception as error:  # whatever it was, `failure` keeps it
                raise AdapterUnavailable(
                    f"{ref} could not be loaded: GET /v1/adapters says why", param="model"
                ) from error.with_traceback(None)
            async with self._bounded(ref):
                await self._slots.enter(ref)
            held.callback(self._slots.leave, ref)
            if self._residents.get(ref) is not resident:
                raise EngineUnavailable("the engine was restarted meanwhile; try again")
            return Lease(self._live_engine(), resident, held.pop_all())

    def lease_if_free(self, manifest: Manifest) -> Lease | None:
        """Lease a revision that is resident and would keep nobody waiting, or None."""
        ref = manifest.ref
        resident = self._residents.get(ref)
        if resident is None or any(turns.has_line for turns in (self._bytes, self._places, self._slots)):
            return None
        with ExitStack() as held:
            held.callback(self._released, ref)
            for turns, cost in ((self._bytes, resident.size), (self._places, 1), (self._slots, 1)):
                if not turns.enter_at_once(ref, cost):
                    return None
                held.callback(turns.leave, ref)
            return Lease(self._live_engine(), resident, held.pop_all())

    async def hold(self, manifest: Manifest) -> tuple[Resident, ExitStack]:
        """Load and prove a revision that failed before or not; it stays while the stack is open.

        Raises AdapterError, AdapterRefused, AdapterUnavailable (no room), EngineUnavailable.
        """
        self._failures.pop(manifest.ref, None)
        with ExitStack() as held:
            return await self._enter_and_load(manifest, held), held.pop_all()

    @asynccontextmanager
    async def _bounded(self, ref: str) -> AsyncIterator[None]:
        """Nobody stands in line for ever. A load is no waiting: it has a limit of its own, in its proof."""
        try:
            async with asyncio.timeout(self.limits.wait_seconds):
                yield
        except TimeoutError as error:
            raise AdapterUnavailable(
                f"{ref} waited {self.limits.wait_seconds:g} s for its turn, as other adapters take all there is of the "
                "engine: try again in a moment, or start the service with a larger XINGLIN_MAX_LORAS or "
                "XINGLIN_MAX_RESIDENT",
                param="model",
            ) from error

    async def _enter_and_load(self, manifest: Manifest, held: ExitStack) -> Resident:
        ref = manifest.ref
        resident = self._residents.get(ref)
        size = resident.size if resident else self._size(manifest)
        if size > self.limits.max_resident_bytes:
            raise AdapterRefused(
                f"{ref} takes {size / 2**30:.2f} GiB, and all adapters together may take "
                f"{self.limits.max_resident_bytes / 2**30:.2f}: start the service with a larger "
                "XINGLIN_MAX_RESIDENT_GIB"
            )
        held.callback(self._released, ref)  # the last to be called
        for turns, cost in ((self._bytes, size), (self._places, 1)):
            async with self._bounded(ref):
                await turns.enter(ref, cost)
            held.callback(turns.leave, ref)
        # From here on it is not idle, and stays once it is there.
        return self._residents.get(ref) or await self._load_once(manifest, size)

    def _size(self, manifest: Manifest) -> int:
        path = self._store.folder(manifest.name, manifest.revision) / "adapter_model.safetensors"
        return path.stat().st_size if path.exists() else 0  # loading it will say what is wrong

    def _released(self, ref: str) -> None:
        if resident := self._residents.get(ref):
            resident.last_used = time.time()
            self.let_go(ref)

    def leases(self, ref: str) -> int:
        """How many hold a revision, or wait for it to be loaded."""
        return self._places.holders(ref)

    # Loading

    async def _load_once(self, manifest: Manifest, size: int) -> Resident:
        """Load, or wait for the load under way. Given up, it still ends before its place is free again."""
        ref = manifest.ref
        error, at = self._failures.get(ref, (None, 0.0))
        if error is not None and time.monotonic() < at + RETRY_SECONDS:
            raise error
        task = self._loads.get(ref)
        if task is None:
            task = asyncio.create_task(self._load(manifest, size), name=f"load {ref}")
            self._loads[ref] = task
            task.add_done_callback(lambda _: self._loads.pop(ref))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():  # however often it is cancelled
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({task})
            raise

    async def _load(self, manifest: Manifest, size: int) -> Resident:
        """Stage, load and prove. What fails leaves nothing in the engine."""
        ref, engine = manifest.ref, self._live_engine()
        started = time.perf_counter()
        try:
            with ExitStack() as held:
                held.enter_context(self._store.hold(manifest))
                staged = await asyncio.to_thread(self._loader.stage, engine, manifest)
                async with self._loading:
                    await self._make_room(size)
                    loaded = await self._loader.load(engine, staged)
                    self._proving.add(ref)
                    await self._loader.prove(engine, loaded, staged)
                    resident = Resident(manifest, loaded, size, held.pop_all())
                    self._residents[ref] = resident
        except EngineUnavailable:
            raise
        except Exception as error:
            # Without its traceback, which would keep the engine, and grow each time it is raised again.
            self._failures[ref] = (error.with_traceback(None), time.monotonic())
            code = code_of(error) if isinstance(error, AdapterError | ApiError) else "unreadable"
            self._metrics.refusals.labels(manifest.name, code).inc()
            raise
        finally:
            self._proving.discard(ref)
        self._failures.pop(ref, None)
        self._metrics.loads.labels(manifest.name, manifest.revision).inc()
        self._metrics.load_seconds.labels("ready").observe(time.perf_counter() - started)
        return resident

    # Leaving

    async def _make_room(self, size: int) -> None:
        """Remove what was used least recently until one more of `size` bytes fits; under the loading lock.

        Turns see to it that what nobody holds is enough.
        """
        while self._residents and (
            len(self._residents) >= self.limits.max_resident
            or sum(r.size for r in self._residents.values()) + size > self.limits.max_resident_bytes
        ):
            idle = [resident for ref, resident in self._residents.items() if not self.leases(ref)]
            victim = min(idle, key=lambda resident: resident.last_used)
            self._metrics.evictions.labels(victim.manifest.name, victim.manifest.revision).inc()
            await self._remove_resident(victim)

    def retire(self, manifest: Manifest) -> None:
        """Let go of a revision that was kept for an alias, unless it is wanted still; end its metrics in a while."""
        self.let_go(manifest.ref)
        asyncio.get_running_loop().call_later(_SERIES_SECONDS, self._end_series, manifest)

    def _end_series(self, manifest: Manifest) -> None:
        if not self._is_wanted(manifest.ref):
            self._metrics.forget(manifest.name, manifest.revision)

    def let_go(self, ref: str) -> None:
        """Remove a revision from the engine if nobody holds it and nobody wants it any more."""
        resident = self._residents.get(ref)
        if resident is None or self.leases(ref) or self._is_wanted(ref):
            return
        task = asyncio.create_task(self._leave(resident), name=f"remove {ref}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, resident: Resident) -> None:
        async with self._loading:
            ref = resident.loaded.name
            if self._residents.get(ref) is resident and not self.leases(ref) and not self._is_wanted(ref):
                await self._remove_resident(resident)

    async def _remove_resident(self, resident: Resident) -> None:
        del self._residents[resident.loaded.name]
        resident.held.close()
        await self._remove(self._live_engine(), resident.loaded)

    async def _remove(self, engine: Engine, adapter: LoadedAdapter) -> None:
        try:
            await engine.remove(adapter)
        except EngineUnavailable:
            logger.info("%s left with its engine", adapter.name)

    # Reading

    def failure(self, ref: str) -> Exception | None:
        """Why a revision could not be loaded the last time it was tried, if it could not."""
        return self._failures.get(ref, (None, 0.0))[0]

    def status(self, ref: str) -> RevisionStatus | None:
        """Where a revision stands; None where the engine neither holds nor loads it."""
        if ref in self._residents:
            is_over = not self._answers(ref) and (self.leases(ref) or not self._is_wanted(ref))
            return RevisionStatus.DRAINING if is_over else RevisionStatus.READY
        if ref in self._loads:
            return RevisionStatus.PROVING if ref in self._proving else RevisionStatus.LOADING
        return None

    def statuses(self) -> dict[str, RevisionStatus]:
        """Of every revision that the engine holds or loads, by ref."""
        found = ((ref, self.status(ref)) for ref in sorted({*self._residents, *self._loads}))
        return {ref: status for ref, status in found if status}

    def residents(self) -> list[Resident]:
        """What the engine holds, by ref."""
        return [resident for _, resident in sorted(self._residents.items())]

    def is_resident(self, ref: str) -> bool:
        """Whether the engine holds it."""
        return ref in self._residents

    @property
    def has_room(self) -> bool:
        """Whether one more could be loaded without removing another."""
        used = sum(resident.size for resident in self._residents.values())
        return len(self._residents) < self.limits.max_resident and used < self.limits.max_resident_bytes

    def waiting(self) -> dict[str, int]:
        """How many requests wait, by ref."""
        found: dict[str, int] = {}
        for turns in (self._bytes, self._places, self._slots):
            for ref, count in turns.waiting().items():
                found[ref] = found.get(ref, 0) + count
        return found

    @property
    def slots_taken(self) -> int:
        """Adapters that have requests in the engine now."""
        return self._slots.taken

    async def held_by_engine(self) -> list[str]:
        """The refs the engine's workers hold, asked from them: ours by name, others by `id:N`."""
        names = {r.loaded.engine_id: ref for ref, r in self._residents.items()}
        return sorted(names.get(id_, f"id:{id_}") for id_ in await self._live_engine().resident())
