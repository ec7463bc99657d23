"""Which revision answers to which name. Requests lease from here; only the reconciler changes it."""

import asyncio
from dataclasses import dataclass, field
from typing import Self

from adapters import DEFAULT_ALIAS, AdapterRef, InvalidRef, Manifest
from app.engine.base import LoadedAdapter
from app.errors import AdapterUnavailable, ModelNotFound


@dataclass(eq=False)
class Resident:
    """A revision the engine holds."""

    manifest: Manifest
    loaded: LoadedAdapter
    is_proven: bool
    leases: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no request holds a lease."""

    def __post_init__(self) -> None:
        self.unused.set()

    @property
    def ref(self) -> str:
        """`name@revision`"""
        return self.loaded.name


class Lease:
    """A request's hold on what answers it, one revision or the base model; a context manager."""

    def __init__(self, resident: Resident | None, base_fingerprint: str) -> None:
        self.resident = resident
        self.fingerprint = resident.ref if resident else base_fingerprint
        if resident:
            resident.leases += 1
            resident.unused.clear()

    @property
    def adapter(self) -> LoadedAdapter | None:
        """What the engine needs; None for the base model."""
        return self.resident.loaded if self.resident else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.resident:
            self.resident.leases -= 1
            if self.resident.leases == 0:
                self.resident.unused.set()


class ServedModels:
    """The names a client may send as `model`: the base model, and every alias that is pointed."""

    def __init__(self, base_model_name: str) -> None:
        self.base_model_name = base_model_name
        self.base_fingerprint = base_model_name
        self.expected: set[tuple[str, str]] = set()
        """Aliases in the store, so that a name not ready yet gets another answer than an unknown one."""
        self._pointed: dict[tuple[str, str], Resident] = {}

    def lease(self, model: str) -> Lease:
        """Lease what answers to `model` now. Raises ModelNotFound, AdapterUnavailable."""
        if model == self.base_model_name:
            return Lease(None, self.base_fingerprint)
        try:
            ref = AdapterRef.parse(model)
        except InvalidRef as error:
            raise self._not_found(model) from error
        resident = self.find(ref)
        if resident is None:
            if (ref.name, ref.alias) in self.expected:
                raise AdapterUnavailable(f"{model} is not ready: GET /v1/adapters says why", param="model")
            raise self._not_found(model)
        return Lease(resident, self.base_fingerprint)

    def find(self, ref: AdapterRef) -> Resident | None:
        """What `ref` names, if it is pointed at."""
        if ref.revision is None:
            return self._pointed.get((ref.name, ref.alias or DEFAULT_ALIAS))
        return next((r for r in self._pointed.values() if r.ref == str(ref)), None)

    def _not_found(self, model: str) -> ModelNotFound:
        names = ", ".join([self.base_model_name, *(name for name, _ in self.named())])
        shown = model if len(model) <= 80 else model[:77] + "..."
        return ModelNotFound(f"the model {shown!r} does not exist; served are: {names}", param="model")

    def named(self) -> list[tuple[str, Resident]]:
        """Every name that can be asked for, with what answers; the alias `default` goes by the bare name."""
        return [
            (name if alias == DEFAULT_ALIAS else f"{name}@{alias}", resident)
            for (name, alias), resident in sorted(self._pointed.items(), key=lambda item: item[0])
        ]

    def point(self, name: str, alias: str, resident: Resident) -> None:
        """From now on `name@alias` is answered by `resident`."""
        self._pointed[name, alias] = resident

    def unpoint(self, name: str, alias: str) -> None:
        """From now on nothing answers to `name@alias`."""
        self._pointed.pop((name, alias), None)

    def pointed_besides(self, name: str, alias: str) -> set[str]:
        """The refs of all revisions that some other name than `name@alias` is answered by."""
        return {resident.ref for key, resident in self._pointed.items() if key != (name, alias)}

    def is_pointed(self, resident: Resident) -> bool:
        """Whether any name is answered by `resident`."""
        return any(resident is other for other in self._pointed.values())

    def clear(self) -> None:
        """Point at nothing: the engine is gone."""
        self._pointed.clear()
