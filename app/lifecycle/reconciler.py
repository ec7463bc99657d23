"""Makes what answers follow the store's aliases: load, prove, point, drain, remove.

The store says what is desired; this one place owns every transition. A revision answers only after it
proved itself; the one before it goes on answering until then, and leaves the engine when its last request
has ended. Aliases moved by anybody (this service's API, another replica, `python -m adapters`, a training
job) are followed the same way.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters import (
    CANARY,
    DEFAULT_ALIAS,
    AdapterError,
    AdapterNotFound,
    AdapterRef,
    AdapterStore,
    BaseModelFacts,
    InvalidAdapter,
    InvalidRef,
    Manifest,
    Traffic,
    validate,
)
from app.engine.base import Engine
from app.errors import AdapterRefused, AdapterUnavailable, ApiError, EngineUnavailable, row
from app.lifecycle.bases import Host, Hosts
from app.lifecycle.desired import Desired
from app.lifecycle.residency import RETRY_SECONDS
from app.lifecycle.served_models import ServedModels
from app.metrics import Metrics

logger = logging.getLogger(__name__)

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
    """One for the store, whatever base models its adapters belong to; `run` it as a task."""

    def __init__(
        self,
        store: AdapterStore,
        served: ServedModels,
        hosts: Hosts,
        metrics: Metrics,
        *,
        allow_revisions: bool,
        interval: float,
    ) -> None:
        """`allow_revisions`: a client may name a revision that no alias points at."""
        self.store = store
        self.status: dict[tuple[str, str], AliasStatus] = {}
        self._served = served
        self._hosts = hosts
        self._metrics = metrics
        self._allow_revisions = allow_revisions
        self._interval = interval
        self._transition: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """One transition of an adapter at a time."""
        self._desired = Desired(store)

    # Following the store

    async def attach(self, host: Host, engine: Engine) -> None:
        """Take a fresh engine and bring its adapters to the desired state once; failures are in `status`.

        What does not fit is proved when it is loaded, at its first request.
        """
        host.residency.attach(engine)
        host.facts = engine.facts
        for status in self.status.values():
            status.failed_at = 0.0
        await self.reconcile(fresh=host)

    async def detach(self, host: Host) -> None:
        """An engine is gone, and all it held."""
        await host.residency.detach()
        for key in self._served.drop(lambda manifest: self._find(manifest) is host):
            self.status[key].actual, self.status[key].state = None, "waiting"

    async def run(self) -> None:
        """Follow the store until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.reconcile()
            except Exception:  # a full disk, a lost mount: what is loaded goes on answering
                logger.exception("the adapter store could not be followed; trying again")

    async def reconcile(self, *, fresh: Host | None = None) -> None:
        """Bring every alias to its desired revision; only those of a `fresh` engine, if there is one.

        One adapter that fails does not hold up the others, and neither does an engine that is gone.
        """
        desired, traffic = await asyncio.to_thread(self._desired.read)
        self._served.expected = set(desired)
        for (name, alias), manifest in desired.items():
            if isinstance(manifest, AdapterError):
                self._record_unreadable(name, alias, manifest)
            elif not self._must_wait(name, alias, manifest, fresh):
                async with self._transition[name]:
                    try:
                        await self._follow(manifest, alias, is_start=fresh is not None)
                    except EngineUnavailable:
                        if fresh:
                            raise
                        # The supervisor sees to it.
        for name, alias in [key for key in self.status if key not in desired]:
            async with self._transition[name]:
                if not await asyncio.to_thread(self._desired.is_chat, name, alias):
                    self._unpoint(name, alias)
        for name in {*traffic, *self._served.traffic}:
            if traffic.get(name) != self._served.traffic.get(name):
                async with self._transition[name]:
                    await self._follow_traffic(name)

    def _must_wait(self, name: str, alias: str, manifest: Manifest, fresh: Host | None) -> bool:
        """Whether there is nothing to do yet, or any more."""
        try:
            host = self._hosts.of(manifest)
            waits = not host.residency.is_attached or (fresh is not None and host is not fresh)
        except AdapterUnavailable:
            waits = True
        except AdapterRefused:  # here is no base model for it: following it says so
            return fresh is not None or self._is_settled(name, alias, manifest)
        if waits:
            self.status.setdefault((name, alias), AliasStatus(desired=manifest.revision))
        return waits or self._is_settled(name, alias, manifest)

    def _find(self, manifest: Manifest) -> Host | None:
        try:
            return self._hosts.of(manifest)
        except ApiError:
            return None

    def _is_settled(self, name: str, alias: str, manifest: Manifest) -> bool:
        """Whether there is nothing to do: it answers already, or failed a moment ago."""
        status = self.status.get((name, alias))
        if status is None or status.desired != manifest.revision:
            return False
        host = self._find(manifest)
        failure = host.residency.failure(_ref(manifest)) if host else None
        answers = status.actual == manifest.revision and failure is None
        return answers or time.monotonic() < status.failed_at + RETRY_SECONDS

    async def _follow(self, manifest: Manifest, alias: str, *, is_start: bool) -> None:
        # It may have moved again, by us or by somebody else, while we waited for our turn.
        name = manifest.name
        moved_on = await asyncio.to_thread(self._desired.aliased, name, alias) != manifest.revision
        if moved_on or self._is_settled(name, alias, manifest):
            return
        status = self.status.setdefault((name, alias), AliasStatus(desired=None))
        status.desired = manifest.revision
        try:
            self._check(manifest)
            residency = self._hosts.of(manifest).residency
            way_back = await asyncio.to_thread(self._desired.way_back, name, alias)
            if is_start and not residency.has_room:
                self._point(manifest, alias, way_back)
                return
            _, held = await residency.hold(manifest)
            with held:
                self._point(manifest, alias, way_back)
        except EngineUnavailable:
            raise
        except Exception as error:  # whatever it is, the other adapters go on
            self._record_failure(name, alias, error)
            if status.actual in (None, manifest.revision):
                await self._fall_back(name, alias, status)

    async def _fall_back(self, name: str, alias: str, status: AliasStatus) -> None:
        """Without a revision before to go on with, the one before that answers. The alias stays where it is."""
        try:
            revision = await asyncio.to_thread(self.store.rollback_target, name, alias)
            manifest = await asyncio.to_thread(self.store.get, AdapterRef(name, revision=revision))
            _, held = await self._hosts.of(manifest).residency.hold(manifest)
        except EngineUnavailable:
            raise
        except Exception as error:
            logger.warning("nothing answers to %s@%s: %s", name, alias, error)
            self._served.unpoint(name, alias)
            status.actual, status.state = None, "failed"
            return
        with held:
            self._served.point(name, alias, manifest)
        status.actual, status.is_proven, status.state = revision, bool(manifest.golden_prompts), "failed"
        logger.warning("%s@%s is answered by its revision before, %s", name, alias, revision)

    async def _follow_traffic(self, name: str) -> None:
        traffic = await asyncio.to_thread(self.store.traffic, name)
        if traffic == Traffic():
            self._served.traffic.pop(name, None)
        else:
            self._served.traffic[name] = traffic

    # What operators ask for

    async def publish(
        self, folder: Path, name: str, *, actor: str, why: str, source: str | None = None
    ) -> Manifest:
        """Validate a folder against the live base model that it was trained on, and put it into the store."""
        self._check_name(name)
        try:
            facts = await self._facts_for(folder)
            return await asyncio.to_thread(
                self.store.publish, folder, name, actor=actor, why=why, source=source, base=facts
            )
        except InvalidAdapter as error:
            # No label is what a client made up.
            self._metrics.refusals.labels("unpublished", row(error).code).inc()
            raise

    async def _facts_for(self, folder: Path) -> BaseModelFacts:
        if len(self._hosts.names) == 1:
            (host,) = self._hosts
        else:
            host = self._hosts.of((await asyncio.to_thread(validate, folder)).provenance)
        return host.residency.engine.facts

    async def point(self, name: str, alias: str, revision: str, *, actor: str, why: str) -> None:
        """Load and prove a revision, and only then move the alias, in the store and here.

        Raises AdapterError, AdapterRefused; then the alias is where it was.
        """
        async with self._transition[name]:
            await self._move(
                name, alias, revision,
                lambda: self.store.set_alias(name, alias, revision, actor=actor, why=why),
            )  # fmt: skip

    async def rollback(self, name: str, alias: str, *, to: str | None, actor: str, why: str) -> str:
        """Move the alias back to `to` or its revision before, which is loaded and proved like any other."""
        async with self._transition[name]:
            revision = to if to else await asyncio.to_thread(self.store.rollback_target, name, alias)
            await self._move(
                name, alias, revision,
                lambda: self.store.rollback(name, alias, to=to, actor=actor, why=why, expected=revision),
            )  # fmt: skip
        return revision

    async def remove(self, name: str, alias: str, *, actor: str, why: str) -> None:
        """Point the alias at nothing, which ends a canary or shadow; its revision leaves the engine."""
        async with self._transition[name]:
            await asyncio.to_thread(self.store.remove_alias, name, alias, actor=actor, why=why)
            self._unpoint(name, alias)
            await self._follow_traffic(name)

    async def split(
        self, name: str, alias: str, revision: str | None, percent: float, *, actor: str, why: str
    ) -> str:
        """Give `canary` or `shadow` its share, after pointing it at `revision` if that is new."""
        async with self._transition[name]:
            await asyncio.to_thread(self.store.get, AdapterRef(name, alias=DEFAULT_ALIAS))
            present = await asyncio.to_thread(self._desired.aliased, name, alias)
            if revision not in (None, present):
                if present is not None:  # the old one's share is not the new one's, not for a moment
                    await asyncio.to_thread(self.store.split, name, alias, 0, actor=actor, why=why)
                    await self._follow_traffic(name)
                await self._move(
                    name, alias, str(revision),
                    lambda: self.store.set_alias(name, alias, str(revision), actor=actor, why=why),
                )  # fmt: skip
            await asyncio.to_thread(self.store.split, name, alias, percent, actor=actor, why=why)
            await self._follow_traffic(name)
        return str(revision or present)

    async def promote(self, name: str, *, actor: str, why: str) -> str:
        """Point `default` at what `canary` points at, and end the canary."""
        async with self._transition[name]:
            revision = await asyncio.to_thread(self._desired.aliased, name, CANARY)
            if revision is None:
                raise AdapterNotFound(f"there is no adapter {name}@{CANARY}")
            await self._move(
                name, DEFAULT_ALIAS, revision,
                lambda: self.store.promote(name, actor=actor, why=why, expected=revision),
            )  # fmt: skip
            self._unpoint(name, CANARY)
            await self._follow_traffic(name)
        return revision

    async def published(self, model: str) -> Manifest | None:
        """A revision that a client named and no alias points at, if the operator allows that."""
        if not self._allow_revisions:
            return None
        try:
            ref = AdapterRef.parse(model)
            if ref.revision is None:
                return None
            manifest = await asyncio.to_thread(self.store.get, ref)
        except (AdapterNotFound, InvalidRef):
            return None
        return manifest if manifest.task == "chat" else None

    async def _move(self, name: str, alias: str, revision: str, move: Callable[[], object]) -> None:
        manifest = await asyncio.to_thread(self.store.get, AdapterRef(name, revision=revision))
        self._check(manifest)
        try:
            _, held = await self._hosts.of(manifest).residency.hold(manifest)
        except (AdapterError, ApiError) as error:
            self._record_failure(name, alias, error)
            raise

        def moved() -> Manifest | None:
            move()
            return self._desired.way_back(name, alias)

        with held:
            self._point(manifest, alias, await asyncio.to_thread(moved))

    def _check_name(self, name: str) -> None:
        if name in self._served.bases:
            raise AdapterRefused(f"{name} is the name of a base model: publish under another name")

    def _check(self, manifest: Manifest) -> None:
        self._check_name(manifest.name)
        if manifest.task != "chat":
            raise AdapterRefused(
                f"{manifest.name} is a {manifest.task} adapter: only chat adapters are served"
            )

    # Transitions; all under the adapter's lock

    def _point(self, manifest: Manifest, alias: str, way_back: Manifest | None) -> None:
        name, revision = manifest.name, manifest.revision
        before = self._kept_for(name, alias)
        self._served.point(name, alias, manifest, way_back=way_back)
        self._served.expected.add((name, alias))
        self.status[name, alias] = AliasStatus(
            desired=revision, actual=revision, state="ready", is_proven=bool(manifest.golden_prompts)
        )
        logger.info("%s@%s is answered by %s", name, alias, revision)
        self._retire(before)

    def _unpoint(self, name: str, alias: str) -> None:
        before = self._kept_for(name, alias)
        self._served.unpoint(name, alias)
        self._served.expected.discard((name, alias))
        self.status.pop((name, alias), None)
        self._retire(before)

    def _retire(self, manifests: Sequence[Manifest]) -> None:
        for manifest in manifests:
            if host := self._find(manifest):
                host.residency.retire(manifest)

    def _kept_for(self, name: str, alias: str) -> list[Manifest]:
        both = self._served.find(AdapterRef(name, alias=alias)), self._served.way_back(name, alias)
        return [manifest for manifest in both if manifest is not None]

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


def _ref(manifest: Manifest) -> str:
    return f"{manifest.name}@{manifest.revision}"
