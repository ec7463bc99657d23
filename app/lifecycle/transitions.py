"""Moving an alias of the running service from one revision to the next, one transition of an adapter at a time."""

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
    """What following the store and operating it have in common. All but `check` is called under `lock`."""

    def __init__(self, store: AdapterStore, served: ServedModels, bases: Bases) -> None:
        self.lock: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By adapter."""
        self.desired = Desired(store)
        self._store = store
        self._served = served
        self._bases = bases

    def check_name(self, name: str) -> None:
        """Raises AdapterRefused for a name that a base model has."""
        if name in self._served.bases:
            raise AdapterRefused(f"{name} is the name of a base model: publish under another name")

    def check(self, manifest: Manifest) -> None:
        """Raises AdapterRefused for a revision that no client may be answered by."""
        self.check_name(manifest.name)
        if manifest.task != "chat":
            raise AdapterRefused(
                f"{manifest.name} is a {manifest.task} adapter: only chat adapters are served"
            )

    def point(self, manifest: Manifest, alias: str, previous: Manifest | None) -> None:
        """Have a revision that is held answer from now on; what it takes the place of may leave."""
        before = self._kept_for(manifest.name, alias)
        self._served.point(manifest.name, alias, manifest, previous=previous)
        logger.info("%s@%s is answered by %s", manifest.name, alias, manifest.revision)
        self._retire(before)

    def unpoint(self, name: str, alias: str) -> None:
        """The alias is no more; what answered to it may leave."""
        before = self._kept_for(name, alias)
        self._served.forget(name, alias)
        self._retire(before)

    def record_failure(self, name: str, alias: str, error: Exception) -> None:
        """Keep and log why the alias stays where it is."""
        logger.warning("%s@%s stays where it is: %s", name, alias, error)
        # What an OSError says holds host paths.
        is_ours = isinstance(error, AdapterError | ApiError)
        self._served.fail(name, alias, str(error) if is_ours else "the store cannot be read")

    async def follow_traffic(self, name: str) -> None:
        """Share out an adapter's requests as the store says."""
        self._served.share(name, await asyncio.to_thread(self._store.traffic, name))

    def _kept_for(self, name: str, alias: str) -> list[Manifest]:
        known = self._served.alias(name, alias)
        return [one for one in (known.answering, known.previous) if one] if known else []

    def _retire(self, manifests: list[Manifest]) -> None:
        for manifest in manifests:
            if base := self._bases.find(manifest):
                base.residency.retire(manifest)
