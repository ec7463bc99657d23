"""The revisions that the engine holds: loads and proves them on demand, and evicts them to make room.

There may be far more adapters than fit. A request holds its revision with a lease. A revision without leases may be
evicted, the least recently used first. It is removed at once when no alias points at it, nor would after a rollback.
Revisions are loaded between two engine steps, one at a time, and never because a step needs one.
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
"""Seconds that the metrics of a removed revision remain for further scrapes."""

RETRY_SECONDS = 30.0
"""Seconds before requests or the reconciler load a failed revision again."""


class RevisionStatus(StrEnum):
    """The status of a revision in one engine."""

    LOADING = "loading"
    """It is being read, checked and loaded."""
    PROVING = "proving"
    """It is loaded, and its golden prompts are being replayed."""
    READY = "ready"
    """It is loaded and proved."""
    DRAINING = "draining"
    """It gets no new requests, and is removed after its last one unless a rollback would need it."""


@dataclass(frozen=True)
class Limits:
    """The limits of one engine."""

    max_resident: int
    max_resident_bytes: int
    """Bytes of adapter files, which take about as much memory in the engine."""
    max_loras: int
    """Adapters that may have requests in the engine at once."""
    wait_seconds: float


@dataclass(eq=False)
class Resident:
    """A revision the engine holds."""

    manifest: Manifest
    loaded: LoadedAdapter
    size: int
    """Size of its weights file in bytes."""
    held: ExitStack
    """The hold that keeps its files from being pruned."""
    last_used: float = field(default_factory=time.time)


class Lease:
    """A request's hold on a revision or the base model; a context manager."""

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
    """The revisions in one base model's engine. It outlives the engine: call `clear` when that has died."""

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
        """`engine` returns the live engine or raises EngineUnavailable. `answers(ref)`: whether new requests may go to
        the revision. `is_wanted(ref)`: whether it may stay without leases.
        """
        self.limits = limits
        self.has_line = asyncio.Event()
        """Set when a request has to wait. Shadow requests clear it, and abort when it is set."""
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

        # Always entered in this order, which prevents deadlocks.
        self._bytes = Turns(limits.max_resident_bytes, on_line=self.has_line.set)
        self._places = Turns(limits.max_resident, on_line=self.has_line.set)
        self._slots = Turns(limits.max_loras, on_line=self.has_line.set)

    async def clear(self) -> None:
        """Forget all revisions, since the engine is gone. Waiting requests fail with EngineUnavailable."""
        for turns in (self._bytes, self._places, self._slots):
            turns.dismiss(EngineUnavailable("the engine stopped and is restarting: retry in a moment"))
        await asyncio.gather(*self._loads.values(), *self._leaving, return_exceptions=True)
        for resident in self._residents.values():
            resident.held.close()
        self._residents.clear()
        self._failures.clear()
        self._loader.forget()

    # Leases

    async def lease(self, manifest: Manifest | None) -> Lease:
        """Lease a revision and an engine slot for one request, and load it if necessary. None: lease the base model.

        Raises AdapterUnavailable if no room became free in time or the revision cannot be loaded, EngineUnavailable.
        """
        if manifest is None:
            return Lease(self._live_engine(), None, ExitStack())
        ref = manifest.ref
        with ExitStack() as held:
            try:
                resident = await self._enter_and_load(manifest, held)
            except (AdapterUnavailable, EngineUnavailable):
                raise
            except Exception as error:  # `failure` keeps the cause
                raise AdapterUnavailable(
                    f"{ref} could not be loaded: GET /v1/adapters shows why", param="model"
                ) from error.with_traceback(None)
            async with self._bounded(ref):
                await self._slots.enter(ref)
            held.callback(self._slots.leave, ref)
            if self._residents.get(ref) is not resident:
                raise EngineUnavailable("the engine restarted meanwhile: retry")
            return Lease(self._live_engine(), resident, held.pop_all())

    def lease_if_free(self, manifest: Manifest) -> Lease | None:
        """Lease a resident revision if there is room and no request waits, else return None."""
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
        """Load and prove a revision even if it failed a moment ago. It stays resident while the stack is open.

        Raises AdapterError, AdapterRefused, AdapterUnavailable (no room), EngineUnavailable.
        """
        self._failures.pop(manifest.ref, None)
        with ExitStack() as held:
            return await self._enter_and_load(manifest, held), held.pop_all()

    @asynccontextmanager
    async def _bounded(self, ref: str) -> AsyncIterator[None]:
        """Limit the wait in one queue. Loading is not waiting: its proof has a limit of its own."""
        try:
            async with asyncio.timeout(self.limits.wait_seconds):
                yield
        except TimeoutError as error:
            raise AdapterUnavailable(
                f"the engine had no room for {ref} within {self.limits.wait_seconds:g} s: retry, or raise "
                "XINGLIN_MAX_LORAS, XINGLIN_MAX_RESIDENT or XINGLIN_MAX_RESIDENT_GIB",
                param="model",
            ) from error

    async def _enter_and_load(self, manifest: Manifest, held: ExitStack) -> Resident:
        ref = manifest.ref
        resident = self._residents.get(ref)
        size = resident.size if resident else self._size(manifest)
        if size > self.limits.max_resident_bytes:
            raise AdapterRefused(
                f"{ref} takes {size / 2**30:.2f} GiB, but all resident adapters together may take "
                f"{self.limits.max_resident_bytes / 2**30:.2f} GiB: raise XINGLIN_MAX_RESIDENT_GIB"
            )
        held.callback(self._released, ref)  # runs last
        for turns, cost in ((self._bytes, size), (self._places, 1)):
            async with self._bounded(ref):
                await turns.enter(ref, cost)
            held.callback(turns.leave, ref)
        # From here on it is not idle and cannot be evicted.
        return self._residents.get(ref) or await self._load_once(manifest, size)

    def _size(self, manifest: Manifest) -> int:
        path = self._store.folder(manifest.name, manifest.revision) / "adapter_model.safetensors"
        return path.stat().st_size if path.exists() else 0  # loading it reports the error

    def _released(self, ref: str) -> None:
        if resident := self._residents.get(ref):
            resident.last_used = time.time()
            self.let_go(ref)

    def leases(self, ref: str) -> int:
        """Return how many requests hold a revision or wait for it to load."""
        return self._places.holders(ref)

    # Loading

    async def _load_once(self, manifest: Manifest, size: int) -> Resident:
        """Load a revision or join its load in progress. If cancelled, first wait for the load, which takes a place."""
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
            while not task.done():  # even if cancelled again
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({task})
            raise

    async def _load(self, manifest: Manifest, size: int) -> Resident:
        """Stage, load and prove a revision. A failure leaves nothing in the engine."""
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
            # Without its traceback, which would keep the engine alive and grow with each raise.
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
        """Evict the least recently used revisions until `size` more bytes fit. Call it under the loading lock.

        The turns guarantee that evicting revisions without leases is enough.
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
        """Remove a revision that was kept for an alias, unless it is still wanted; end its metrics later."""
        self.let_go(manifest.ref)
        asyncio.get_running_loop().call_later(_SERIES_SECONDS, self._end_series, manifest)

    def _end_series(self, manifest: Manifest) -> None:
        if not self._is_wanted(manifest.ref):
            self._metrics.forget(manifest.name, manifest.revision)

    def let_go(self, ref: str) -> None:
        """Remove a revision from the engine if it has no leases and is not wanted."""
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
            logger.info("%s is gone with its engine", adapter.name)

    # Reading

    def failure(self, ref: str) -> Exception | None:
        """Return the error of a revision's last load, or None."""
        return self._failures.get(ref, (None, 0.0))[0]

    def status(self, ref: str) -> RevisionStatus | None:
        """Return the status of a revision; None if the engine neither holds nor loads it."""
        if ref in self._residents:
            is_over = not self._answers(ref) and (self.leases(ref) or not self._is_wanted(ref))
            return RevisionStatus.DRAINING if is_over else RevisionStatus.READY
        if ref in self._loads:
            return RevisionStatus.PROVING if ref in self._proving else RevisionStatus.LOADING
        return None

    def statuses(self) -> dict[str, RevisionStatus]:
        """Return the status of every revision that the engine holds or loads, by ref."""
        found = ((ref, self.status(ref)) for ref in sorted({*self._residents, *self._loads}))
        return {ref: status for ref, status in found if status}

    def residents(self) -> list[Resident]:
        """Return the resident revisions, sorted by ref."""
        return [resident for _, resident in sorted(self._residents.items())]

    def is_resident(self, ref: str) -> bool:
        """Whether the engine holds a revision."""
        return ref in self._residents

    @property
    def has_room(self) -> bool:
        """Whether the engine has room for another revision without evicting one."""
        used = sum(resident.size for resident in self._residents.values())
        return len(self._residents) < self.limits.max_resident and used < self.limits.max_resident_bytes

    def waiting(self) -> dict[str, int]:
        """Return the number of waiting requests, by ref."""
        found: dict[str, int] = {}
        for turns in (self._bytes, self._places, self._slots):
            for ref, count in turns.waiting().items():
                found[ref] = found.get(ref, 0) + count
        return found

    @property
    def slots_taken(self) -> int:
        """The number of adapters with requests in the engine."""
        return self._slots.taken

    async def held_by_engine(self) -> list[str]:
        """Ask the engine's workers for the adapters they hold: refs of the resident ones, `id:N` for any other."""
        names = {r.loaded.engine_id: ref for ref, r in self._residents.items()}
        return sorted(names.get(id_, f"id:{id_}") for id_ in await self._live_engine().resident())
