"""Which revision answers to which name: the one truth about every alias. Requests choose here, and change nothing."""

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
    """Who answers one request."""

    manifest: Manifest | None
    """None for a base model."""
    shadow: Manifest | None = None
    """Who gets a copy of it."""
    base: str | None = None
    """The name of the base model, if that answers itself."""


@dataclass
class Alias:
    """One alias: what the store wants, what answers, and why the two differ if they do."""

    desired: str | None
    """The revision that the store's alias names; None for an alias that only was asked for."""
    answering: Manifest | None = None
    """What answers now, whatever is desired."""
    previous: Manifest | None = None
    """What a rollback would point it at; it stays in the engine while there is room."""
    last_error: str | None = None
    failed_at: float | None = None
    """When `last_error` came up, on time.monotonic's clock; None once it may be tried again."""

    @property
    def actual(self) -> str | None:
        """The revision that answers now."""
        return self.answering.revision if self.answering else None

    @property
    def is_followed(self) -> bool:
        """Whether what is desired answers."""
        return self.answering is not None and self.actual == self.desired


class ServedModels:
    """The names a client may send as `model`: the base models, and every alias that something answers to."""

    def __init__(self, bases: Sequence[str]) -> None:
        """`bases`: the names of the base models."""
        self.bases = tuple(bases)
        self._aliases: dict[tuple[str, str], Alias] = {}
        self._traffic: dict[str, Traffic] = {}
        """By adapter; those without canary and shadow are left out."""

    # Choosing

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
            known = self._aliases.get((ref.name, ref.alias or DEFAULT_ALIAS))
            if ref.revision is None and known and known.desired:
                raise AdapterUnavailable(f"{model} is not ready: GET /v1/adapters says why", param="model")
            raise self.not_found(model)
        if ref.alias == DEFAULT_ALIAS and (traffic := self._traffic.get(ref.name)):
            return self._split(ref.name, manifest, traffic, session)
        return Choice(manifest)

    def _split(self, name: str, manifest: Manifest, traffic: Traffic, session: str | None) -> Choice:
        """A canary or shadow that does not stand (yet) gets nothing: the rest goes on as ever."""
        canary = self.find(AdapterRef(name, alias=CANARY))
        shadow = self.find(AdapterRef(name, alias=SHADOW))
        if canary and _is_chosen(traffic.canary, canary, session):
            manifest = canary
        if shadow and not _is_chosen(traffic.shadow, shadow, None):
            shadow = None
        return Choice(manifest, shadow)

    def find(self, ref: AdapterRef) -> Manifest | None:
        """What `ref` names, if it answers."""
        if ref.revision is None:
            alias = self._aliases.get((ref.name, ref.alias or DEFAULT_ALIAS))
            return alias.answering if alias else None
        return next((m for m in self._answering() if (m.name, m.revision) == (ref.name, ref.revision)), None)

    def not_found(self, model: str) -> ModelNotFound:
        """The error for a name that nothing answers to; it lists some that something does."""
        names = [*self.bases, *(name for name, _ in self.named())]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        shown = model if len(model) <= 80 else model[:77] + "..."
        return ModelNotFound(f"the model {shown!r} does not exist; served are: {listed}", param="model")

    # Reading

    def named(self) -> list[tuple[str, Manifest]]:
        """Every name that can be asked for, with what answers; the alias `default` goes by the bare name."""
        return [
            (name if alias == DEFAULT_ALIAS else f"{name}@{alias}", one.answering)
            for (name, alias), one in self.aliases()
            if one.answering
        ]

    def aliases(self) -> list[tuple[tuple[str, str], Alias]]:
        """Every alias that is known, by name and alias."""
        return sorted(self._aliases.items(), key=lambda item: item[0])

    def alias(self, name: str, alias: str) -> Alias | None:
        """One of them."""
        return self._aliases.get((name, alias))

    def traffic(self, name: str) -> Traffic | None:
        """The shares of an adapter's requests; None without canary and shadow."""
        return self._traffic.get(name)

    def shared(self) -> set[str]:
        """The adapters whose requests are shared out."""
        return {*self._traffic}

    def is_answering(self, ref: str) -> bool:
        """Whether any name is answered by the revision `name@revision`."""
        return any(manifest.ref == ref for manifest in self._answering())

    def is_wanted(self, ref: str) -> bool:
        """Whether any name is answered by the revision `name@revision`, or would be after a rollback."""
        previous = (alias.previous for alias in self._aliases.values())
        return self.is_answering(ref) or any(manifest.ref == ref for manifest in previous if manifest)

    def _answering(self) -> Iterator[Manifest]:
        return (alias.answering for alias in self._aliases.values() if alias.answering)

    # Changing

    def expect(self, name: str, alias: str, revision: str) -> None:
        """The store has this alias: until something answers to it, it is not ready, and not unknown."""
        known = self._aliases.setdefault((name, alias), Alias(revision))
        known.desired = known.desired or revision

    def want(self, name: str, alias: str, revision: str) -> Alias:
        """The store's alias names another revision; what failed before says nothing of it."""
        known = self._aliases.setdefault((name, alias), Alias(revision))
        if known.desired != revision:
            known.desired, known.last_error, known.failed_at = revision, None, None
        return known

    def point(self, name: str, alias: str, manifest: Manifest, *, previous: Manifest | None = None) -> None:
        """From now on `name@alias` is answered by this revision, as desired."""
        self._aliases[name, alias] = Alias(manifest.revision, manifest, previous)

    def fall_back(self, name: str, alias: str, manifest: Manifest | None) -> None:
        """What is desired failed: `name@alias` is answered by another revision, or by nothing."""
        known = self._aliases[name, alias]
        known.answering, known.previous = manifest, None

    def fail(self, name: str, alias: str, why: str) -> None:
        """Something went wrong with `name@alias`; what answers goes on answering."""
        known = self._aliases.setdefault((name, alias), Alias(None))
        known.last_error, known.failed_at = why, time.monotonic()

    def forget(self, name: str, alias: str) -> None:
        """There is no such alias any more."""
        self._aliases.pop((name, alias), None)

    def drop(self, is_gone: Callable[[Manifest], bool]) -> None:
        """Nothing is answered by what is gone with its engine, until it has been loaded again."""
        for key, alias in self._aliases.items():
            if alias.answering and is_gone(alias.answering):
                self._aliases[key] = Alias(alias.desired)

    def try_again(self) -> None:
        """An engine is new: what failed before may be tried at once."""
        for alias in self._aliases.values():
            alias.failed_at = None

    def share(self, name: str, traffic: Traffic) -> None:
        """Give canary and shadow of an adapter their shares of its requests."""
        if traffic == Traffic():
            self._traffic.pop(name, None)
        else:
            self._traffic[name] = traffic


def _is_chosen(percent: float, manifest: Manifest, session: str | None) -> bool:
    if session is None:
        return random.random() * 100 < percent  # noqa: S311 - a share, and no secret
    return is_in_share(percent, revision=manifest.revision, session=session)
