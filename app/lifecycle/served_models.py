"""Which revision answers to which name. Requests choose here; only the reconciler changes it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters import (
    CANARY,
    DEFAULT_ALIAS,
    SHADOW,
    AdapterRef,
    InvalidRef,
    Manifest,
    Traffic,
    is_in_share,
)
from app.errors import AdapterUnavailable, ModelNotFound


@dataclass(frozen=True)
class Choice:
    """Who answers one request."""

    manifest: Manifest | None
    """None for a base model."""
    shadow: Manifest | None = None
    """Who gets a copy of it."""
    base: str | None = None
    """The name of the base model, if that answers itself."""


class ServedModels:
    """The names a client may send as `model`: the base models, and every alias that is pointed."""

    def __init__(self, bases: Sequence[str]) -> None:
        """`bases`: the names of the base models."""
        self.bases = tuple(bases)
        self.expected: set[tuple[str, str]] = set()
        """Aliases in the store, so that a name not ready yet gets another answer than an unknown one."""
        self.traffic: dict[str, Traffic] = {}
        """By adapter; those without canary and shadow are left out."""
        self._pointed: dict[tuple[str, str], Manifest] = {}
        self._way_back: dict[tuple[str, str], Manifest] = {}

    def choose(self, model: str, session: str | None = None) -> Choice:
        """Who answers a request for `model`. The same `session` gets the same side of a canary each time.

        Raises ModelNotFound, AdapterUnavailable.
        """
        if model in self.bases:
            return Choice(None, base=model)
        try:
            ref = AdapterRef.parse(model)
        except InvalidRef as error:
            raise self.not_found(model) from error
        manifest = self.find(ref)
        if manifest is None:
            if (ref.name, ref.alias) in self.expected:
                raise AdapterUnavailable(f"{model} is not ready: GET /v1/adapters says why", param="model")
            raise self.not_found(model)
        if ref.alias == DEFAULT_ALIAS and (traffic := self.traffic.get(ref.name)):
            return self._split(ref.name, manifest, traffic, session)
        return Choice(manifest)

    def _split(self, name: str, manifest: Manifest, traffic: Traffic, session: str | None) -> Choice:
        """A canary or shadow that does not stand (yet) gets nothing: the rest goes on as ever."""
        canary = self._pointed.get((name, CANARY))
        shadow = self._pointed.get((name, SHADOW))
        if canary and _is_chosen(traffic.canary, canary, session):
            manifest = canary
        if shadow and not _is_chosen(traffic.shadow, shadow, None):
            shadow = None
        return Choice(manifest, shadow)

    def find(self, ref: AdapterRef) -> Manifest | None:
        """What `ref` names, if it is pointed at."""
        if ref.revision is None:
            return self._pointed.get((ref.name, ref.alias or DEFAULT_ALIAS))
        return next(
            (m for m in self._pointed.values() if (m.name, m.revision) == (ref.name, ref.revision)), None
        )

    def not_found(self, model: str) -> ModelNotFound:
        """The error for a name that nothing answers to; it lists some that something does."""
        names = [*self.bases, *(name for name, _ in self.named())]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        shown = model if len(model) <= 80 else model[:77] + "..."
        return ModelNotFound(f"the model {shown!r} does not exist; served are: {listed}", param="model")

    def named(self) -> list[tuple[str, Manifest]]:
        """Every name that can be asked for, with what answers; the alias `default` goes by the bare name."""
        return [
            (name if alias == DEFAULT_ALIAS else f"{name}@{alias}", manifest)
            for (name, alias), manifest in sorted(self._pointed.items(), key=lambda item: item[0])
        ]

    def way_back(self, name: str, alias: str) -> Manifest | None:
        """What a rollback of `name@alias` would point it at."""
        return self._way_back.get((name, alias))

    def point(self, name: str, alias: str, manifest: Manifest, *, way_back: Manifest | None = None) -> None:
        """From now on `name@alias` is answered by this revision, and `way_back` is kept for its rollback."""
        self._pointed[name, alias] = manifest
        self._way_back.pop((name, alias), None)
        if way_back is not None:
            self._way_back[name, alias] = way_back

    def unpoint(self, name: str, alias: str) -> None:
        """From now on nothing answers to `name@alias`."""
        self._pointed.pop((name, alias), None)
        self._way_back.pop((name, alias), None)

    def is_wanted(self, ref: str) -> bool:
        """Whether any name is answered by the revision `name@revision`, or would be after a rollback."""
        kept = (*self._pointed.values(), *self._way_back.values())
        return any(f"{manifest.name}@{manifest.revision}" == ref for manifest in kept)

    def drop(self, is_gone: Callable[[Manifest], bool]) -> list[tuple[str, str]]:
        """Point at nothing of what is gone with its engine; the names and aliases that nothing answers to now."""
        gone = [key for key, manifest in self._pointed.items() if is_gone(manifest)]
        for name, alias in gone:
            self.unpoint(name, alias)
        return gone


def _is_chosen(percent: float, manifest: Manifest, session: str | None) -> bool:
    if session is None:
        return random.random() * 100 < percent  # noqa: S311 - a share, and no secret
    return is_in_share(percent, revision=manifest.revision, session=session)
