"""Maps served names to revisions: the single source of truth for every alias. Requests only read it."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
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
    """The revision or base model that answers one request."""

    manifest: Manifest | None
    """None for a base model."""
    shadow: Manifest | None = None
    """The revision that gets a copy of the request."""
    base: str | None = None
    """The name of the base model, if it answers without an adapter."""


@dataclass
class Alias:
    """One alias: the desired revision, the actual one, and the reason if they differ."""

    desired: str | None
    """The revision that the store's alias points at; None for an alias that is not in the store."""
    answering: Manifest | None = None
    """The revision that answers now, desired or not."""
    previous: Manifest | None = None
    """The revision that a rollback would point at; it stays in the engine while there is room."""
    last_error: str | None = None
    failed_at: float | None = None
    """When `last_error` occurred, on time.monotonic's clock; None if it may be retried at once."""

    @property
    def actual(self) -> str | None:
        """The revision that answers now."""
        return self.answering.revision if self.answering else None

    @property
    def is_followed(self) -> bool:
        """Whether the desired revision answers."""
        return self.answering is not None and self.actual == self.desired


class ServedModels:
    """The names a client may send as `model`: the base models, and every alias with a revision that answers."""

    def __init__(self, bases: Sequence[str]) -> None:
        """`bases`: the names of the base models."""
        self.bases = tuple(bases)
        self._aliases: dict[tuple[str, str], Alias] = {}
        self._traffic: dict[str, Traffic] = {}
        """By adapter; only those with a canary or shadow."""

    # Choosing

    def choose(self, model: str, session: str | None = None) -> Choice:
        """Choose what answers a request for `model`. The same `session` always gets the same side of a canary.

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
            known = self._aliases.get((ref.name, ref.alias or DEFAULT_ALIAS))
            if ref.revision is None and known and known.desired:
                raise AdapterUnavailable(f"{model} is not ready: GET /v1/adapters shows why", param="model")
            raise self.not_found(model)
        if ref.alias == DEFAULT_ALIAS and (traffic := self._traffic.get(ref.name)):
            return self._split(ref.name, manifest, traffic, session)
        return Choice(manifest)

    def _split(self, name: str, manifest: Manifest, traffic: Traffic, session: str | None) -> Choice:
        """Choose between `default` and canary, and for the shadow. Those that are not ready get no requests."""
        canary = self.find(AdapterRef(name, alias=CANARY))
        shadow = self.find(AdapterRef(name, alias=SHADOW))
        if canary and _is_chosen(traffic.canary, canary, session):
            manifest = canary
        if shadow and not _is_chosen(traffic.shadow, shadow, None):
            shadow = None
        return Choice(manifest, shadow)

    def find(self, ref: AdapterRef) -> Manifest | None:
        """Return the revision that answers to `ref`, or None."""
        if ref.revision is None:
            alias = self._aliases.get((ref.name, ref.alias or DEFAULT_ALIAS))
            return alias.answering if alias else None
        return next((m for m in self._answering() if (m.name, m.revision) == (ref.name, ref.revision)), None)

    def not_found(self, model: str) -> ModelNotFound:
        """Return the error for an unknown model name; it lists some served models."""
        names = [*self.bases, *(name for name, _ in self.named())]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        shown = model if len(model) <= 80 else model[:77] + "..."
        return ModelNotFound(f"the model {shown!r} does not exist; served models: {listed}", param="model")

    # Reading

    def named(self) -> list[tuple[str, Manifest]]:
        """Return every served name with its revision; the alias `default` has the bare name."""
        return [
            (name if alias == DEFAULT_ALIAS else f"{name}@{alias}", one.answering)
            for (name, alias), one in self.aliases()
            if one.answering
        ]

    def aliases(self) -> list[tuple[tuple[str, str], Alias]]:
        """Return every known alias, sorted by name and alias."""
        return sorted(self._aliases.items(), key=lambda item: item[0])

    def alias(self, name: str, alias: str) -> Alias | None:
        """Return one alias, or None."""
        return self._aliases.get((name, alias))

    def traffic(self, name: str) -> Traffic | None:
        """Return an adapter's traffic shares; None without canary and shadow."""
        return self._traffic.get(name)

    def shared(self) -> set[str]:
        """Return the adapters that have a canary or shadow."""
        return {*self._traffic}

    def is_answering(self, ref: str) -> bool:
        """Whether any served name is answered by the revision `name@revision`."""
        return any(manifest.ref == ref for manifest in self._answering())

    def is_wanted(self, ref: str) -> bool:
        """Whether any served name is answered by the revision `name@revision`, or would be after a rollback."""
        previous = (alias.previous for alias in self._aliases.values())
        return self.is_answering(ref) or any(manifest.ref == ref for manifest in previous if manifest)

    def _answering(self) -> Iterator[Manifest]:
        return (alias.answering for alias in self._aliases.values() if alias.answering)

    # Changing

    def expect(self, name: str, alias: str, revision: str) -> None:
        """Register an alias of the store: until a revision answers, it is not ready rather than unknown."""
        known = self._aliases.setdefault((name, alias), Alias(revision))
        known.desired = known.desired or revision

    def want(self, name: str, alias: str, revision: str) -> Alias:
        """Set the desired revision of an alias and return the alias. A new revision clears the last error."""
        known = self._aliases.setdefault((name, alias), Alias(revision))
        if known.desired != revision:
            known.desired, known.last_error, known.failed_at = revision, None, None
        return known

    def point(self, name: str, alias: str, manifest: Manifest, *, previous: Manifest | None = None) -> None:
        """Let this revision, which is the desired one, answer to `name@alias`."""
        self._aliases[name, alias] = Alias(manifest.revision, manifest, previous)

    def fall_back(self, name: str, alias: str, manifest: Manifest | None) -> None:
        """Let another revision, or none, answer to `name@alias`, since the desired one failed."""
        known = self._aliases[name, alias]
        known.answering, known.previous = manifest, None

    def fail(self, name: str, alias: str, why: str) -> None:
        """Record an error of `name@alias`; the revision that answers keeps answering."""
        known = self._aliases.setdefault((name, alias), Alias(None))
        known.last_error, known.failed_at = why, time.monotonic()

    def forget(self, name: str, alias: str) -> None:
        """Forget an alias that was removed."""
        self._aliases.pop((name, alias), None)

    def drop(self, is_gone: Callable[[Manifest], bool]) -> None:
        """Let no revision answer that is gone with its engine; its aliases keep their desired one."""
        for key, alias in self._aliases.items():
            if alias.answering and is_gone(alias.answering):
                self._aliases[key] = Alias(alias.desired)

    def try_again(self) -> None:
        """Let failed revisions be retried at once, since an engine is new."""
        for alias in self._aliases.values():
            alias.failed_at = None

    def share(self, name: str, traffic: Traffic) -> None:
        """Set the shares of an adapter's canary and shadow."""
        if traffic == Traffic():
            self._traffic.pop(name, None)
        else:
            self._traffic[name] = traffic


def _is_chosen(percent: float, manifest: Manifest, session: str | None) -> bool:
    if session is None:
        return random.random() * 100 < percent  # noqa: S311 - not a secret
    return is_in_share(percent, revision=manifest.revision, session=session)
