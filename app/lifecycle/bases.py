"""The base models of the service. Each has its own engine and the adapters that were trained on it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from adapters import Manifest, Provenance
from app.engine.supervisor import BaseStatus, Supervisor
from app.errors import AdapterRefused, AdapterUnavailable, ApiError
from app.lifecycle.residency import Residency
from app.lifecycle.served_models import Choice

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Base:
    """One base model. Its engine may start, die and restart while the others answer."""

    name: str
    """The name that clients use."""
    supervisor: Supervisor
    residency: Residency

    @property
    def fingerprint(self) -> str:
        """The base model's name and fingerprint, as in `system_fingerprint`."""
        facts = self.supervisor.facts
        return f"{self.name}@{facts.fingerprint}" if facts else self.name

    @property
    def is_to_come(self) -> bool:
        """Whether its fingerprint is still unknown but expected."""
        return self.supervisor.facts is None and self.supervisor.state.status is not BaseStatus.FAILED


class Bases:
    """All base models, in the order of the settings."""

    def __init__(self, bases: Sequence[Base]) -> None:
        self._by_name = {base.name: base for base in bases}

    def __iter__(self) -> Iterator[Base]:
        return iter(self._by_name.values())

    @property
    def names(self) -> list[str]:
        """The names that clients use for the base models."""
        return [*self._by_name]

    def named(self, name: str) -> Base:
        """Return a base model by name. Raises KeyError."""
        return self._by_name[name]

    def check_ready(self) -> None:
        """Check that at least one base model is ready. Raises EngineUnavailable."""
        if not any(base.supervisor.is_ready for base in self):
            failed = BaseStatus.FAILED
            waiting = next((base for base in self if base.supervisor.state.status is not failed), None)
            (waiting or next(iter(self))).supervisor.check_ready()

    def answering(self, choice: Choice) -> Base:
        """Return the base model that serves a choice. Raises what `of` raises."""
        return self._by_name[choice.base] if choice.base else self.of(cast(Manifest, choice.manifest))

    def of(self, trained: Provenance) -> Base:
        """Return the base model that a revision was trained on.

        Base models of the same structure (a model and its instruct version) share a fingerprint. Between those the
        name decides, and the golden prompts prove it. Raises AdapterRefused if the base model is not served,
        AdapterUnavailable while that is unknown.
        """
        if len(self._by_name) == 1:
            return next(iter(self))  # validation reports every fault of an adapter that does not fit
        named = self._by_name.get(trained.base_model or "")
        if trained.base_fingerprint is None:
            return named or next(iter(self))
        fitting = [
            base
            for base in self
            if base.supervisor.facts and base.supervisor.facts.fingerprint == trained.base_fingerprint
        ]
        if named in fitting:
            return named
        if fitting and not (named and named.is_to_come):
            return fitting[0]
        if any(base.is_to_come for base in self):
            raise AdapterUnavailable(
                "the adapter is waiting for its base model to start: retry in a moment", param="model"
            )
        known = ", ".join(base.fingerprint for base in self)
        raise AdapterRefused(
            f"the adapter was trained on {trained.base_model} with fingerprint {trained.base_fingerprint}, but this "
            f"service runs {known}: serve it on its own base model, or train it on one of these"
        )

    def find(self, trained: Provenance) -> Base | None:
        """Return the base model that a revision was trained on, or None if it is not served or not known yet."""
        try:
            return self.of(trained)
        except ApiError:
            return None

    async def run(
        self,
        *,
        attach: Callable[[Base], Awaitable[None]],
        detach: Callable[[Base], Awaitable[None]],
        on_start: Callable[[], None],
        on_settled: Callable[[], None],
        on_give_up: Callable[[], None],
    ) -> None:
        """Keep all engines running until cancelled.

        Calls `attach` to fill a new engine before it answers, and `detach` after its death. Calls `on_start` for each
        engine that becomes ready, `on_settled` when no base model is starting any more and at least one is ready,
        `on_give_up` if all have failed.
        """
        starting = asyncio.Lock()
        """One engine starts at a time: they would mismeasure free memory and compete for cores."""

        def ready() -> None:
            on_start()
            if all(base.supervisor.is_settled for base in self):
                on_settled()

        async def keep(base: Base) -> None:
            try:
                await base.supervisor.run(
                    starting=starting,
                    prepare=partial(attach, base),
                    on_ready=ready,
                    on_death=partial(detach, base),
                )
            except Exception:
                logger.exception("giving up: the engine of %s could not be started", base.name)
                if all(other.supervisor.state.status is BaseStatus.FAILED for other in self):
                    on_give_up()
                elif all(other.supervisor.is_settled for other in self):
                    on_settled()

        await asyncio.gather(*(keep(base) for base in self))
