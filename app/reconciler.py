"""Makes the engine hold what the store's aliases point at: stage, load, prove, point, drain, remove.

The store says what is desired; this one place owns every transition. A revision answers only after it
proved itself; the one before it goes on answering until then, and leaves the engine when its last request
has ended. Aliases moved by anybody (this service's API, another replica, `python -m adapters`, a training
job) are followed the same way.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters import (
    GOLDEN_FILE,
    AdapterError,
    AdapterRef,
    AdapterStore,
    BaseModelFacts,
    GoldenPrompt,
    Manifest,
    read_golden,
    validate,
)
from app.engine.base import Engine, LoadedAdapter
from app.errors import AdapterRefused, ApiError, EngineUnavailable
from app.metrics import Metrics
from app.proof import prove
from app.served_models import Resident, ServedModels

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 30.0
"""A desired revision that failed is tried again after this, or at once when the alias moves."""

_PROOF_SECONDS = 60

State = Literal["waiting", "ready", "failed"]


@dataclass
class AliasStatus:
    """What became of one alias. `actual` is the revision that answers now, whatever is desired."""

    desired: str | None
    actual: str | None = None
    state: State = "waiting"
    is_proven: bool = False
    last_error: str | None = None
    failed_at: float = 0.0


class Reconciler:
    """One for each engine; `run` it as a task."""

    def __init__(
        self,
        store: AdapterStore,
        served: ServedModels,
        metrics: Metrics,
        *,
        allow_unproven: bool,
        max_adapters: int,
        interval: float,
    ) -> None:
        self.store = store
        self.status: dict[tuple[str, str], AliasStatus] = {}
        self._served = served
        self._metrics = metrics
        self._allow_unproven = allow_unproven
        self._max_adapters = max_adapters
        self._interval = interval
        self._engine: Engine | None = None
        self._residents: dict[str, Resident] = {}
        self._transition = asyncio.Lock()
        self._drains: set[asyncio.Task[None]] = set()

    # Following the store

    async def attach(self, engine: Engine) -> None:
        """Take a fresh engine and bring it to the desired state once; failures are in `status`."""
        self._engine = engine
        self._served.base_fingerprint = f"{engine.facts.name}@{engine.facts.fingerprint}"
        for status in self.status.values():
            status.failed_at = 0.0
        await self.reconcile()

    async def detach(self) -> None:
        """The engine is gone, and all it held."""
        self._engine = None
        for task in self._drains:
            task.cancel()
        async with self._transition:
            self._served.clear()
            self._residents.clear()
            for status in self.status.values():
                status.actual, status.state = None, "waiting"

    async def run(self) -> None:
        """Follow the store until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.reconcile()
            except EngineUnavailable:
                continue  # the supervisor sees to it
            except Exception:  # a full disk, a lost mount: what is loaded goes on answering
                logger.exception("the adapter store could not be followed; trying again")

    async def reconcile(self) -> None:
        """Bring every alias to its desired revision. One adapter that fails does not hold up the others."""
        desired = await asyncio.to_thread(self._desired)
        self._served.expected = set(desired)
        for (name, alias), manifest in desired.items():
            if isinstance(manifest, AdapterError):
                self._record_unreadable(name, alias, manifest)
            elif not self._is_settled(name, alias, manifest):
                async with self._transition:
                    await self._follow(name, alias, manifest)
        for name, alias in [key for key in self.status if key not in desired]:
            async with self._transition:
                if await asyncio.to_thread(self._aliased, name, alias) is None:
                    self._unpoint(name, alias)

    def _is_settled(self, name: str, alias: str, manifest: Manifest) -> bool:
        """Whether there is nothing to do: it answers already, or failed a moment ago."""
        status = self.status.get((name, alias))
        if status is None or status.desired != manifest.revision:
            return False
        return status.actual == manifest.revision or time.monotonic() < status.failed_at + _RETRY_SECONDS

    async def _follow(self, name: str, alias: str, manifest: Manifest) -> None:
        # It may have moved again, by us or by somebody else, while we waited for our turn.
        moved_on = await asyncio.to_thread(self._aliased, name, alias) != manifest.revision
        if moved_on or self._is_settled(name, alias, manifest):
            return
        status = self.status.setdefault((name, alias), AliasStatus(desired=None))
        status.desired = manifest.revision
        try:
            self._point(name, alias, await self._make_resident(manifest, alias))
        except EngineUnavailable:
            raise
        except Exception as error:  # whatever it is, the other adapters go on
            self._record_failure(name, alias, error)
            if status.actual is None:
                await self._fall_back(name, alias, status)

    async def _fall_back(self, name: str, alias: str, status: AliasStatus) -> None:
        """After a restart onto a revision that fails, the one before answers. The alias stays where it is."""
        try:
            revision = await asyncio.to_thread(self.store.rollback_target, name, alias)
            manifest = await asyncio.to_thread(self.store.get, AdapterRef(name, revision=revision))
            resident = await self._make_resident(manifest, alias)
        except EngineUnavailable:
            raise
        except Exception as error:
            logger.warning("nothing answers to %s@%s: %s", name, alias, error)
            return
        self._served.point(name, alias, resident)
        status.actual, status.is_proven = revision, resident.is_proven
        logger.warning("%s@%s is answered by its revision before, %s", name, alias, resident.ref)

    def _aliased(self, name: str, alias: str) -> str | None:
        return self.store.aliases(name).get(alias)

    def _desired(self) -> dict[tuple[str, str], Manifest | AdapterError]:
        """What every chat alias of the store points at, or why that cannot be read."""
        found: dict[tuple[str, str], Manifest | AdapterError] = {}
        for name in self.store.names():
            for alias, revision in self.store.aliases(name).items():
                try:
                    manifest = self.store.get(AdapterRef(name, revision=revision))
                except AdapterError as error:
                    found[name, alias] = error
                    continue
                if manifest.task == "chat":
                    found[name, alias] = manifest
        return found

    # What operators ask for

    async def publish(self, folder: Path, name: str, *, actor: str, why: str) -> Manifest:
        """Validate a folder against the live base model and put it into the store."""
        engine = self._live_engine()
        try:
            return await asyncio.to_thread(
                self.store.publish, folder, name, actor=actor, why=why, base=engine.facts
            )
        except AdapterError:
            self._metrics.refusals.labels("validation").inc()
            raise

    async def point(self, name: str, alias: str, revision: str, *, actor: str, why: str) -> None:
        """Load and prove a revision, and only then move the alias, in the store and here.

        Raises AdapterError, AdapterRefused; then the alias is where it was.
        """

        def move() -> None:
            self.store.set_alias(name, alias, revision, actor=actor, why=why)

        async with self._transition:
            await self._move(name, alias, revision, move)

    async def rollback(self, name: str, alias: str, *, actor: str, why: str) -> str:
        """Move the alias back to its revision before, which is loaded and proved like any other."""
        async with self._transition:
            revision = await asyncio.to_thread(self.store.rollback_target, name, alias)

            def move() -> None:
                self.store.rollback(name, alias, actor=actor, why=why, expected=revision)

            await self._move(name, alias, revision, move)
        return revision

    async def remove(self, name: str, alias: str, *, actor: str, why: str) -> None:
        """Point the alias at nothing; its revision leaves the engine, and stays in the store."""
        async with self._transition:
            await asyncio.to_thread(self.store.remove_alias, name, alias, actor=actor, why=why)
            self._unpoint(name, alias)

    async def _move(self, name: str, alias: str, revision: str, move: Callable[[], None]) -> None:
        manifest = await asyncio.to_thread(self.store.get, AdapterRef(name, revision=revision))
        self._check_name(manifest)
        try:
            resident = await self._make_resident(manifest, alias)
        except (AdapterError, ApiError) as error:
            self._record_failure(name, alias, error)
            raise
        try:
            await asyncio.to_thread(move)
        except BaseException:
            self._retire_if_unused(resident)
            raise
        self._point(name, alias, resident)

    def _check_name(self, manifest: Manifest) -> None:
        if manifest.name == self._served.base_model_name:
            raise AdapterRefused(f"{manifest.name} is the name of the base model: publish under another name")
        if manifest.task != "chat":
            raise AdapterRefused(
                f"{manifest.name} is a {manifest.task} adapter: only chat adapters are served"
            )

    # Transitions; all under the lock

    async def _make_resident(self, manifest: Manifest, alias: str) -> Resident:
        """Stage, load and prove a revision for `alias`. What fails leaves nothing in the engine."""
        engine = self._live_engine()
        ref = f"{manifest.name}@{manifest.revision}"
        self._check_name(manifest)
        others = self._served.pointed_besides(manifest.name, alias)
        if ref not in others and len(others) >= self._max_adapters:
            raise AdapterRefused(
                f"{len(others)} other revisions are pointed at, and the limit is {self._max_adapters}: point fewer "
                f"aliases, or start the service with XINGLIN_MAX_ADAPTERS={len(others) + 1} or more"
            )
        if ref in self._residents:
            return self._residents[ref]
        # The engine has room for twice as many; beyond that it would evict one that is in use.
        if len(self._residents) >= 2 * self._max_adapters:
            raise AdapterRefused(
                f"{len(self._residents) - len(others)} revisions still answer requests from before their alias "
                "moved: try again when those have ended, or start the service with a larger XINGLIN_MAX_ADAPTERS"
            )
        started = time.perf_counter()
        folder, golden = await asyncio.to_thread(self._stage, manifest, engine.facts)
        try:
            loaded = await engine.load(ref, folder)
        except AdapterRefused:
            self._metrics.refusals.labels("load").inc()
            raise
        try:
            if golden:
                async with asyncio.timeout(_PROOF_SECONDS):
                    proof = await prove(engine, loaded, golden, manifest.dtype)
                logger.info(
                    "%s proved itself: %d tokens of %d golden prompts, largest difference from the trainer %.1e",
                    ref, proof.tokens, proof.prompts, max(proof.adapter_difference, proof.base_difference),
                )  # fmt: skip
        except BaseException as error:
            self._metrics.refusals.labels("proof").inc()
            await asyncio.shield(self._remove(loaded))
            if isinstance(error, TimeoutError):
                raise AdapterRefused(
                    f"{ref} could not be proved within {_PROOF_SECONDS} s: the engine is busy with other adapters; "
                    "try again, or start the service with a larger XINGLIN_MAX_LORAS"
                ) from error
            raise
        resident = Resident(manifest, loaded, is_proven=bool(golden))
        self._residents[ref] = resident
        self._metrics.load_seconds.observe(time.perf_counter() - started)
        return resident

    def _stage(self, manifest: Manifest, facts: BaseModelFacts) -> tuple[Path, list[GoldenPrompt]]:
        """Check a revision once more before an engine sees it; reading it also warms the page cache."""
        folder = self.store.verify(manifest)
        validate(folder, facts)
        if not manifest.golden_prompts:
            if not self._allow_unproven:
                raise AdapterRefused(
                    f"{manifest.name}@{manifest.revision} brings no {GOLDEN_FILE} to prove it by: train it with "
                    "python -m training, or start the service with XINGLIN_ALLOW_UNPROVEN=true"
                )
            return folder, []
        return folder, read_golden(folder / GOLDEN_FILE)

    def _point(self, name: str, alias: str, resident: Resident) -> None:
        before = self._served.find(AdapterRef(name, alias=alias))
        self._served.point(name, alias, resident)
        self._served.expected.add((name, alias))
        revision = resident.manifest.revision
        self.status[name, alias] = AliasStatus(
            desired=revision, actual=revision, state="ready", is_proven=resident.is_proven
        )
        logger.info("%s@%s is answered by %s", name, alias, resident.ref)
        if before is not None:
            self._retire_if_unused(before)

    def _unpoint(self, name: str, alias: str) -> None:
        before = self._served.find(AdapterRef(name, alias=alias))
        self._served.unpoint(name, alias)
        self.status.pop((name, alias), None)
        if before is not None:
            self._retire_if_unused(before)

    def _record_failure(self, name: str, alias: str, error: Exception) -> None:
        logger.warning("%s@%s stays where it is: %s", name, alias, error)
        status = self.status.setdefault((name, alias), AliasStatus(desired=None))
        # What an OSError says holds host paths.
        status.last_error = (
            str(error) if isinstance(error, AdapterError | ApiError) else "the store cannot be read"
        )
        status.failed_at = time.monotonic()
        if status.actual is None or status.actual != status.desired:
            status.state = "failed"

    def _record_unreadable(self, name: str, alias: str, error: AdapterError) -> None:
        status = self.status.get((name, alias))
        if status is None or status.last_error != str(error):  # once, not every round
            self._record_failure(name, alias, error)

    # Leaving

    def _retire_if_unused(self, resident: Resident) -> None:
        """Let a revision that nothing points at leave the engine once its last request has ended."""
        if self._served.is_pointed(resident):
            return
        task = asyncio.create_task(self._drain(resident), name=f"drain {resident.ref}")
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    async def _drain(self, resident: Resident) -> None:
        await resident.unused.wait()
        async with self._transition:
            is_held = self._served.is_pointed(resident) or resident.leases
            if is_held or self._residents.get(resident.ref) is not resident:
                return  # pointed at again meanwhile (whoever ends that drains it again), or gone with its engine
            del self._residents[resident.ref]
            await self._remove(resident.loaded)

    async def _remove(self, adapter: LoadedAdapter) -> None:
        try:
            await self._live_engine().remove(adapter)
        except EngineUnavailable:
            logger.info("%s left with its engine", adapter.name)

    # Reading

    def _live_engine(self) -> Engine:
        if self._engine is None or self._engine.is_dead:
            raise EngineUnavailable("the engine is not ready; GET /readyz says when it is")
        return self._engine

    async def held_by_engine(self) -> list[str]:
        """The refs the engine's workers hold, asked from them: ours by name, others by `id:N`."""
        engine = self._live_engine()
        names = {resident.loaded.engine_id: resident.ref for resident in self._residents.values()}
        return sorted(names.get(id_, f"id:{id_}") for id_ in await engine.resident())

    def leases(self) -> dict[str, int]:
        """Requests that hold each resident revision now, draining ones included."""
        return {ref: resident.leases for ref, resident in sorted(self._residents.items())}
