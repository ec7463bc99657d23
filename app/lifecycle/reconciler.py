"""Reconciles the served revisions with the store's aliases: load, prove, point, drain, remove.

The store holds the desired state. A revision answers only after its proof. Until then the previous one answers; it
leaves the engine after its last request. It makes no difference who moves an alias: another replica,
`python -m adapters` or a training job.
"""

import asyncio
import logging
import time
from enum import StrEnum

from adapters import AdapterError, AdapterRef, AdapterStore, Manifest
from app.errors import AdapterRefused, AdapterUnavailable, EngineUnavailable
from app.lifecycle.bases import Base, Bases
from app.lifecycle.desired import Unreadable
from app.lifecycle.residency import RETRY_SECONDS, RevisionStatus
from app.lifecycle.served_models import Alias, ServedModels
from app.lifecycle.transitions import Transitions

logger = logging.getLogger(__name__)


class AliasStatus(StrEnum):
    """The progress of the revision that an alias points at."""

    LOADING = "loading"
    """It waits for its base model or for room, or is being loaded."""
    PROVING = "proving"
    """It is in the engine, and its golden prompts are being replayed."""
    READY = "ready"
    """It answers."""
    FAILED = "failed"
    """It could not be loaded or proved; `last_error` says why. Another revision may still answer."""


class Reconciler:
    """Follows one store for all base models; start `run` as a task."""

    def __init__(
        self,
        store: AdapterStore,
        served: ServedModels,
        bases: Bases,
        transitions: Transitions,
        *,
        interval: float,
    ) -> None:
        """`interval`: seconds between checks of the store."""
        self._store = store
        self._served = served
        self._bases = bases
        self._transitions = transitions
        self._interval = interval

    def status(self, name: str, alias: Alias) -> AliasStatus:
        """Return the status of an alias of the adapter `name`."""
        if alias.is_followed:
            return AliasStatus.READY
        if alias.last_error is not None:
            return AliasStatus.FAILED
        held = {base.residency.status(f"{name}@{alias.desired}") for base in self._bases}
        # Between its proof and the move of the alias it is ready but does not answer yet.
        is_loaded = held & {RevisionStatus.PROVING, RevisionStatus.READY}
        return AliasStatus.PROVING if is_loaded else AliasStatus.LOADING

    async def attach(self, base: Base) -> None:
        """Bring the adapters of a new engine to the desired state once; failures are kept with the aliases.

        Revisions that do not fit into the engine are loaded and proved at their first request.
        """
        self._served.try_again()
        await self.reconcile(fresh=base)

    async def detach(self, base: Base) -> None:
        """Forget the revisions of an engine that is gone."""
        await base.residency.clear()
        self._served.drop(lambda manifest: self._bases.find(manifest) is base)

    async def run(self) -> None:
        """Follow the store until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.reconcile()
            except Exception:  # a full disk, a lost mount: loaded revisions keep answering
                logger.exception("could not follow the adapter store; retrying")

    async def reconcile(self, *, fresh: Base | None = None) -> None:
        """Bring every alias to its desired revision; with `fresh`, only those of that base model.

        A failing adapter or a dead engine does not hold up the others.
        """
        transitions = self._transitions
        desired, traffic = await asyncio.to_thread(transitions.desired.read)
        for (name, alias), manifest in desired.items():
            self._served.expect(name, alias, manifest.revision)
            if isinstance(manifest, Unreadable):
                self._record_unreadable(name, alias, manifest.error)
                continue
            if self._is_due(name, alias, manifest, fresh):
                async with transitions.lock[name]:
                    try:
                        await self._follow(manifest, alias, is_start=fresh is not None)
                    except EngineUnavailable:
                        if fresh:
                            raise
                        # The supervisor restarts the engine.
        for name, alias in [key for key, _ in self._served.aliases() if key not in desired]:
            async with transitions.lock[name]:
                if not await asyncio.to_thread(transitions.desired.is_chat, name, alias):
                    transitions.unpoint(name, alias)
        for name in {*traffic, *self._served.shared()}:
            if traffic.get(name) != self._served.traffic(name):
                async with transitions.lock[name]:
                    await transitions.follow_traffic(name)

    def _is_due(self, name: str, alias: str, manifest: Manifest, fresh: Base | None) -> bool:
        """Whether this round has work to do for the alias."""
        if self._is_settled(name, alias, manifest):
            return False
        try:
            base = self._bases.of(manifest)
        except AdapterUnavailable:
            return False  # its base model is still starting
        except AdapterRefused:
            return fresh is None  # no base model fits: following the alias records that
        return base.supervisor.has_engine if fresh is None else base is fresh

    def _is_settled(self, name: str, alias: str, manifest: Manifest) -> bool:
        """Whether the revision answers already, or failed less than RETRY_SECONDS ago."""
        known = self._served.alias(name, alias)
        if known is None or known.desired != manifest.revision:
            return False
        if known.failed_at is not None and time.monotonic() < known.failed_at + RETRY_SECONDS:
            return True
        base = self._bases.find(manifest)
        return known.is_followed and not (base and base.residency.failure(manifest.ref))

    async def _follow(self, manifest: Manifest, alias: str, *, is_start: bool) -> None:
        # The alias may have moved again while this waited for the lock.
        name, transitions = manifest.name, self._transitions
        moved_on = await asyncio.to_thread(transitions.desired.aliased, name, alias) != manifest.revision
        if moved_on or self._is_settled(name, alias, manifest):
            return
        known = self._served.want(name, alias, manifest.revision)
        try:
            transitions.check(manifest)
            residency = self._bases.of(manifest).residency
            previous = await asyncio.to_thread(transitions.desired.previous, name, alias)
            if is_start and not residency.has_room:
                transitions.point(manifest, alias, previous)
                return
            _, held = await residency.hold(manifest)
            with held:
                transitions.point(manifest, alias, previous)
        except EngineUnavailable:
            raise
        except Exception as error:  # whatever it is, it must not stop the other adapters
            transitions.record_failure(name, alias, error)
            if known.actual in (None, manifest.revision):
                await self._fall_back(name, alias)

    async def _fall_back(self, name: str, alias: str) -> None:
        """Let the previous revision answer if it can, since no proven one does. The store's alias does not move."""
        try:
            revision = await asyncio.to_thread(self._store.previous, name, alias)
            manifest = await asyncio.to_thread(self._store.get, AdapterRef(name, revision=revision))
            _, held = await self._bases.of(manifest).residency.hold(manifest)
        except EngineUnavailable:
            raise
        except Exception as error:
            logger.warning("no revision answers to %s@%s: %s", name, alias, error)
            self._served.fall_back(name, alias, None)
            return
        with held:
            self._served.fall_back(name, alias, manifest)
        logger.warning("%s@%s now answers with its previous revision %s", name, alias, revision)

    def _record_unreadable(self, name: str, alias: str, error: AdapterError) -> None:
        known = self._served.alias(name, alias)
        if known is None or known.last_error != str(error):  # log it once, not every round
            self._transitions.record_failure(name, alias, error)
