"""Moves aliases of the running service between revisions, one transition of an adapter at a time."""

import asyncio
import logging
from collections import defaultdict

from adapters import AdapterError, AdapterStore, Manifest
from app.errors import AdapterRefused, ApiError
from app.lifecycle.bases import Bases
from app.lifecycle.desired import Desired
from app.lifecycle.served_models import ServedModels

logger = logging.getLogger(__name__)


class Transitions:
    """Shared by the reconciler and the operations. Call everything but `check` and `check_name` under `lock`."""

    def __init__(self, store: AdapterStore, served: ServedModels, bases: Bases) -> None:
        self.lock: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """One lock for each adapter."""
        self.desired = Desired(store)
        self._store = store
        self._served = served
        self._bases = bases

    def check_name(self, name: str) -> None:
        """Check that no base model has this name. Raises AdapterRefused."""
        if name in self._served.bases:
            raise AdapterRefused(
                f"{name} is the name of a base model: publish the adapter under another name"
            )

    def check(self, manifest: Manifest) -> None:
        """Check that a revision may be served. Raises AdapterRefused."""
        self.check_name(manifest.name)
        if manifest.task != "chat":
            raise AdapterRefused(
                f"{manifest.name} is a {manifest.task} adapter: only chat adapters are served"
            )

    def point(self, manifest: Manifest, alias: str, previous: Manifest | None) -> None:
        """Let a held revision answer from now on, and retire the one it replaces."""
        before = self._kept_for(manifest.name, alias)
        self._served.point(manifest.name, alias, manifest, previous=previous)
        logger.info("%s@%s now answers with %s", manifest.name, alias, manifest.revision)
        self._retire(before)

    def unpoint(self, name: str, alias: str) -> None:
        """Forget an alias, and retire its revisions."""
        before = self._kept_for(name, alias)
        self._served.forget(name, alias)
        self._retire(before)

    def record_failure(self, name: str, alias: str, error: Exception) -> None:
        """Record and log why an alias did not move."""
        logger.warning("%s@%s did not move: %s", name, alias, error)
        # The message of an OSError may hold host paths.
        is_ours = isinstance(error, AdapterError | ApiError)
        self._served.fail(name, alias, str(error) if is_ours else "the store cannot be read")

    async def follow_traffic(self, name: str) -> None:
        """Apply the store's traffic shares of an adapter."""
        self._served.share(name, await asyncio.to_thread(self._store.traffic, name))

    def _kept_for(self, name: str, alias: str) -> list[Manifest]:
        known = self._served.alias(name, alias)
        return [one for one in (known.answering, known.previous) if one] if known else []

    def _retire(self, manifests: list[Manifest]) -> None:
        for manifest in manifests:
            if base := self._bases.find(manifest):
                base.residency.retire(manifest)
