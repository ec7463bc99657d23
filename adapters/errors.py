"""Errors about adapters.

AdapterError
├── InvalidRef        an invalid name, alias or revision
├── InvalidAdapter    a folder that must not be served: all problems at once
├── AdapterNotFound   no such adapter, revision or alias in this store
├── NothingToRollBack an alias without a previous revision
├── AliasMoved        an alias that was moved concurrently
└── StoreDamaged      files that differ from those published
"""

from collections.abc import Sequence


class AdapterError(Exception):
    """Base class. Messages may be shown to clients: they contain no host path."""


class InvalidRef(AdapterError):
    """The name, alias or revision is invalid."""


class InvalidAdapter(AdapterError):
    """The folder must not be served.

    `problems` lists every problem: the value found, the value expected and the fix.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class AdapterNotFound(AdapterError):
    """No such adapter, revision or alias in this store."""


class NothingToRollBack(AdapterError):
    """The alias has no previous revision."""


class AliasMoved(AdapterError):
    """The alias was moved concurrently."""


class StoreDamaged(AdapterError):
    """The files on disk differ from those published."""


def shown(value: object) -> str:
    """Return a value from a file or request as short ASCII text for a message."""
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
