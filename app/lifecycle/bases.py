"""The base models of the service: each with an engine of its own, and with the adapters that were trained on it."""

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
    """One base model. Its engine may start, die and be rebuilt while the others answer."""

    name: str
    """On the wire."""
    supervisor: Supervisor
    residency: Residency

    @property
    def fingerprint(self) -> str:
        """The base model and its fingerprint, as replies name it."""
        facts = self.supervisor.facts
        return f"{self.name}@{facts.fingerprint}" if facts else self.name

    @property
    def is_to_come(self) -> bool:
        """Whether its fingerprint is not known yet, and will be."""
        return self.supervisor.facts is None and self.supervisor.state.status is not BaseStatus.FAILED


class Bases:
    """All of them, in the order of the settings."""

    def __init__(self, bases: Sequence[Base]) -> None:
        self._by_name = {base.name: base for base in bases}

    def __iter__(self) -> Iterator[Base]:
        return iter(self._by_name.values())

    @property
    def names(self) -> list[str]:
        """Of the base models, on the wire."""
        return [*self._by_name]

    def named(self, name: str) -> Base:
        """A base model that there is."""
        return self._by_name[name]

    def check_ready(self) -> None:
        """Raises EngineUnavailable while none can answer."""
        if not any(base.supervisor.is_ready for base in self):
            failed = BaseStatus.FAILED
            waiting = next((base for base in self if base.supervisor.state.status is not failed), None)
            (waiting or next(iter(self))).supervisor.check_ready()

    def answering(self, choice: Choice) -> Base:
        """The base model that a choice is made on. Raises what `of` raises."""
        return self._by_name[choice.base] if choice.base else self.of(cast(Manifest, choice.manifest))

    def of(self, trained: Provenance) -> Base:
        """The base model that a revision was trained on.

        Base models of one structure (a model and its instruct version) have one fingerprint: between those the
        name decides, and the golden prompts prove it. Raises AdapterRefused when the base model is not here,
        AdapterUnavailable while nobody can say.
        """
        if len(self._by_name) == 1:
            return next(iter(self))  # what does not fit is refused there, with all that is wrong with it
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
            raise AdapterUnavailable("the adapter waits for its base model to start", param="model")
        known = ", ".join(base.fingerprint for base in self)
        raise AdapterRefused(
            f"it was trained on {trained.base_model} with fingerprint {trained.base_fingerprint}, and this service "
            f"runs {known}: serve it on its own base, or train it on one of these"
        )

    def find(self, trained: Provenance) -> Base | None:
        """The base model that a revision was trained on, if that is known to be here."""
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

        `attach` fills a fresh engine before it answers, `detach` follows its death. `on_start` is called for each
        engine that becomes ready, `on_settled` when no base model is starting any more and one of them answers,
        `on_give_up` when none ever will.
        """
        starting = asyncio.Lock()
        """Engines that start together take each other's memory for used, and each other's cores."""

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
                logger.exception("giving up: the engine of %s cannot be started", base.name)
                if all(other.supervisor.state.status is BaseStatus.FAILED for other in self):
                    on_give_up()
                elif all(other.supervisor.is_settled for other in self):
                    on_settled()

        await asyncio.gather(*(keep(base) for base in self))
