"""The operations on adapters: publish, point, roll back, split, promote, remove.

A revision is loaded and proved before an alias moves to it, in the store and in the service. A failure leaves the alias
where it was.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

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
    validate,
)
from app.errors import ApiError, code_of
from app.lifecycle.bases import Bases
from app.lifecycle.transitions import Transitions
from app.metrics import Metrics


class Operations:
    """The operations. Those that take `actor` and `why` write them to the adapter's log."""

    def __init__(
        self,
        store: AdapterStore,
        bases: Bases,
        transitions: Transitions,
        metrics: Metrics,
        *,
        allow_revisions: bool,
    ) -> None:
        """`allow_revisions`: clients may request a revision that no alias points at."""
        self._store = store
        self._bases = bases
        self._transitions = transitions
        self._metrics = metrics
        self._allow_revisions = allow_revisions

    async def publish(
        self, folder: Path, name: str, *, actor: str, why: str, source: str | None = None
    ) -> Manifest:
        """Validate a folder against the live base model that it was trained on, and publish it to the store."""
        self._transitions.check_name(name)
        try:
            facts = await self._facts_for(folder)
            return await asyncio.to_thread(
                self._store.publish, folder, name, actor=actor, why=why, source=source, base=facts
            )
        except InvalidAdapter as error:
            # Metric labels never hold text from a client.
            self._metrics.refusals.labels("unpublished", code_of(error)).inc()
            raise

    async def _facts_for(self, folder: Path) -> BaseModelFacts:
        if len(self._bases.names) == 1:
            (base,) = self._bases
        else:
            base = self._bases.of((await asyncio.to_thread(validate, folder)).provenance)
        return base.supervisor.engine.facts

    async def point(self, name: str, alias: str, revision: str, *, actor: str, why: str) -> None:
        """Load and prove a revision, then move the alias to it, in the store and in the service.

        Raises AdapterError, AdapterRefused; the alias then stays where it was.
        """
        async with self._transitions.lock[name]:
            await self._move(
                name, alias, revision,
                lambda: self._store.set_alias(name, alias, revision, actor=actor, why=why),
            )  # fmt: skip

    async def rollback(self, name: str, alias: str, *, to: str | None, actor: str, why: str) -> str:
        """Load and prove `to` or the previous revision, move the alias back to it, and return it."""
        async with self._transitions.lock[name]:
            revision = to if to else await asyncio.to_thread(self._store.previous, name, alias)
            await self._move(
                name, alias, revision,
                lambda: self._store.rollback(name, alias, to=to, actor=actor, why=why, expected=revision),
            )  # fmt: skip
        return revision

    async def remove(self, name: str, alias: str, *, actor: str, why: str) -> None:
        """Remove an alias, which ends a canary or shadow. Its revision leaves the engine."""
        async with self._transitions.lock[name]:
            await asyncio.to_thread(self._store.remove_alias, name, alias, actor=actor, why=why)
            self._transitions.unpoint(name, alias)
            await self._transitions.follow_traffic(name)

    async def split(
        self, name: str, alias: str, revision: str | None, percent: float, *, actor: str, why: str
    ) -> str:
        """Point `canary` or `shadow` at `revision` if that is new, set its share, and return its revision."""
        async with self._transitions.lock[name]:
            await asyncio.to_thread(self._store.get, AdapterRef(name, alias=DEFAULT_ALIAS))
            present = await asyncio.to_thread(self._transitions.desired.aliased, name, alias)
            if revision not in (None, present):
                if (
                    present is not None
                ):  # the new revision must not get the old one's share, not even for a moment
                    await asyncio.to_thread(self._store.split, name, alias, 0, actor=actor, why=why)
                    await self._transitions.follow_traffic(name)
                await self._move(
                    name, alias, str(revision),
                    lambda: self._store.set_alias(name, alias, str(revision), actor=actor, why=why),
                )  # fmt: skip
            await asyncio.to_thread(self._store.split, name, alias, percent, actor=actor, why=why)
            await self._transitions.follow_traffic(name)
        return str(revision or present)

    async def promote(self, name: str, *, actor: str, why: str) -> str:
        """Point `default` at the canary's revision, end the canary, and return the revision."""
        async with self._transitions.lock[name]:
            revision = await asyncio.to_thread(self._transitions.desired.aliased, name, CANARY)
            if revision is None:
                raise AdapterNotFound(f"there is no adapter {name}@{CANARY}")
            await self._move(
                name, DEFAULT_ALIAS, revision,
                lambda: self._store.promote(name, actor=actor, why=why, expected=revision),
            )  # fmt: skip
            self._transitions.unpoint(name, CANARY)
            await self._transitions.follow_traffic(name)
        return revision

    async def published(self, model: str) -> Manifest | None:
        """Return the published revision that `model` names, if the operator allows such requests, else None."""
        if not self._allow_revisions:
            return None
        try:
            ref = AdapterRef.parse(model)
            if ref.revision is None:
                return None
            manifest = await asyncio.to_thread(self._store.get, ref)
        except (AdapterNotFound, InvalidRef):
            return None
        return manifest if manifest.task == "chat" else None

    async def _move(self, name: str, alias: str, revision: str, move: Callable[[], object]) -> None:
        manifest = await asyncio.to_thread(self._store.get, AdapterRef(name, revision=revision))
        self._transitions.check(manifest)
        try:
            _, held = await self._bases.of(manifest).residency.hold(manifest)
        except (AdapterError, ApiError) as error:
            self._transitions.record_failure(name, alias, error)
            raise

        def moved() -> Manifest | None:
            move()
            return self._transitions.desired.previous(name, alias)

        with held:
            self._transitions.point(manifest, alias, await asyncio.to_thread(moved))
