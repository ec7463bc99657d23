"""The base models of the service: each with an engine of its own, and with the adapters that were trained on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from adapters import BaseModelFacts, Provenance
from app.engine.base import Engine
from app.engine.supervisor import Supervisor
from app.errors import AdapterRefused, AdapterUnavailable, EngineUnavailable
from app.lifecycle.residency import Residency


@dataclass(eq=False)
class Host:
    """One base model. Its engine may start, die and be rebuilt while the others answer."""

    name: str
    """On the wire."""
    residency: Residency
    supervisor: Supervisor = field(init=False)
    facts: BaseModelFacts | None = None
    """Known from when its engine is up for the first time."""
    has_come: bool = False
    """Whether it has answered."""
    failure: str | None = None
    """Why it never will."""

    @property
    def fingerprint(self) -> str:
        """The base model and its fingerprint, as replies name it."""
        return f"{self.name}@{self.facts.fingerprint}" if self.facts else self.name

    @property
    def is_settled(self) -> bool:
        """Whether it answers, or never will."""
        return self.failure is not None or self.supervisor.is_ready

    @property
    def engine(self) -> Engine:
        """The live engine. Raises EngineUnavailable."""
        self.check_ready()
        return self.supervisor.engine

    def check_ready(self) -> None:
        """Raises EngineUnavailable while it cannot answer."""
        if self.failure is not None:
            raise EngineUnavailable(
                f"the base model {self.name} could not be started; the service's log says why", param="model"
            )
        self.supervisor.check_ready()


class Hosts:
    """All of them, in the order of the settings."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._by_name = {host.name: host for host in hosts}

    def __iter__(self) -> Iterator[Host]:
        return iter(self._by_name.values())

    @property
    def names(self) -> list[str]:
        """Of the base models, on the wire."""
        return [*self._by_name]

    def named(self, name: str) -> Host:
        """The host of a base model that there is."""
        return self._by_name[name]

    def check_ready(self) -> None:
        """Raises EngineUnavailable while none can answer."""
        if not any(host.supervisor.is_ready for host in self):
            next((host for host in self if host.failure is None), next(iter(self))).check_ready()

    def of(self, trained: Provenance) -> Host:
        """Where a revision belongs: on the base model that it was trained on.

        Base models of one structure (a model and its instruct version) have one fingerprint: between those the
        name decides, and the golden prompts prove it. Raises AdapterRefused when the base is not here,
        AdapterUnavailable while nobody can say.
        """
        if len(self._by_name) == 1:
            return next(iter(self))  # what does not fit is refused there, with all that is wrong with it
        named = self._by_name.get(trained.base_model or "")
        if trained.base_fingerprint is None:
            return named or next(iter(self))
        fitting = [host for host in self if host.facts and host.facts.fingerprint == trained.base_fingerprint]
        if named in fitting:
            return named
        is_to_come = named is not None and named.facts is None and named.failure is None
        if fitting and not is_to_come:
            return fitting[0]
        if any(host.facts is None and host.failure is None for host in self):
            raise AdapterUnavailable("the adapter waits for its base model to start", param="model")
        known = ", ".join(host.fingerprint for host in self)
        raise AdapterRefused(
            f"it was trained on {trained.base_model} with fingerprint {trained.base_fingerprint}, and this service "
            f"runs {known}: serve it on its own base, or train it on one of these"
        )
