"""The desired state, read from the store. Every method reads files: call it in a thread."""

import logging
from dataclasses import dataclass

from adapters import AdapterError, AdapterRef, AdapterStore, Manifest, Traffic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unreadable:
    """A revision that an alias points at but that cannot be read."""

    revision: str
    error: AdapterError


class Desired:
    """Reads the aliases of a store; caches the manifests, which never change."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._manifests: dict[AdapterRef, Manifest] = {}

    def read(self) -> tuple[dict[tuple[str, str], Manifest | Unreadable], dict[str, Traffic]]:
        """Return what every chat alias points at, by name and alias, and the traffic shares by name."""
        found: dict[tuple[str, str], Manifest | Unreadable] = {}
        pointed = self._store.pointed()
        manifests: dict[AdapterRef, Manifest] = {}
        for (name, alias), revision in pointed.items():
            ref = AdapterRef(name, revision=revision)
            try:
                manifest = self._manifests.get(ref) or self._store.get(ref)
            except AdapterError as error:
                found[name, alias] = Unreadable(revision, error)
                continue
            manifests[ref] = manifest
            if manifest.task == "chat":
                found[name, alias] = manifest
        self._manifests = manifests
        traffic: dict[str, Traffic] = {}
        for name in {name for name, _ in pointed}:
            try:
                traffic[name] = self._store.traffic(name)
            except AdapterError as error:
                logger.warning("%s", error)
        return found, {name: shares for name, shares in traffic.items() if shares != Traffic()}

    def aliased(self, name: str, alias: str) -> str | None:
        """Return the revision that an alias points at, or None."""
        return self._store.aliases(name).get(alias)

    def is_chat(self, name: str, alias: str) -> bool:
        """Whether the alias exists and points at a chat adapter."""
        revision = self.aliased(name, alias)
        try:
            return (
                revision is not None and self._store.get(AdapterRef(name, revision=revision)).task == "chat"
            )
        except AdapterError:
            return True  # keep what answers; the next round reports the error

    def previous(self, name: str, alias: str) -> Manifest | None:
        """Return the previous revision of an alias; None if there is none or it cannot be read."""
        try:
            revision = self._store.previous(name, alias)
            return self._store.get(AdapterRef(name, revision=revision))
        except AdapterError:  # a rollback reports the error
            return None
