"""Everything that can go wrong with an adapter.

AdapterError
├── InvalidRef        a name, alias or revision that cannot be one
├── InvalidAdapter    a folder that must not be served: every problem at once
├── AdapterNotFound   no such adapter, revision or alias in this store
├── NothingToRollBack an alias without an earlier revision
├── AliasMoved        an alias that somebody else moved meanwhile
└── StoreDamaged      what is on disk is not what was published
"""

from collections.abc import Sequence


class AdapterError(Exception):
    """Base of the tree. The message is fit for a client: it names no path of the host."""


class InvalidRef(AdapterError):
    """A name, alias or revision that cannot be one."""


class InvalidAdapter(AdapterError):
    """A folder that must not be served.

    `problems` holds all that is wrong, each with what was found, what was expected and what fixes it.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class AdapterNotFound(AdapterError):
    """No such adapter, revision or alias in this store."""


class NothingToRollBack(AdapterError):
    """The alias has never pointed at another revision."""


class AliasMoved(AdapterError):
    """Somebody else moved the alias meanwhile."""


class StoreDamaged(AdapterError):
    """What is on disk is not what was published."""


def shown(value: object) -> str:
    """How a message shows what it found in a file or a request: ASCII, and short."""
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
