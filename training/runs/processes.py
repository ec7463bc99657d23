"""The processes of one distributed job. Rank 0, the leader, alone writes and publishes.

A launcher (`accelerate launch`, torchrun) sets rank and world size in the environment. The leader broadcasts values
that all processes must agree on, so every process must call the functions below in the same order. torch and accelerate
are imported only when there are several processes.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from training.runs.events import Event, EventLog

T = TypeVar("T")


def count() -> int:
    """Number of processes (WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Rank of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def leads() -> bool:
    """Whether this process is the leader; a single process is."""
    return number() == 0


def led(work: Callable[[], T]) -> T:
    """Run `work` in the leader only; return its result, or raise its exception, in all processes."""
    if count() == 1:
        return work()
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if leads():
        try:
            told[0] = work()
        except Exception as error:
            told[1] = type(error), str(error)
            failure = error
    _distributed().broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        kind, message = told[1]
        raise kind.__new__(kind, message)  # bypass __init__, whose arguments only the leader knows
    return told[0]


def any_of(is_so: bool) -> bool:
    """Whether the value is true in any process."""
    if count() == 1:
        return is_so
    told: list[bool] = [False] * count()
    _distributed().all_gather_object(told, is_so)
    return any(told)


def _distributed() -> Any:
    """Return torch.distributed, connected."""
    import torch  # noqa: PLC0415
    from accelerate import PartialState  # noqa: PLC0415

    PartialState(
        cpu=not torch.cuda.is_available()
    )  # the first call connects; the trainers reuse the connection
    return torch.distributed


class Unheard(EventLog):
    """An event log that discards events, for processes other than the leader."""

    def __init__(self) -> None:
        """Open no file."""

    def write(self, event: Event) -> None:
        """Discard the event."""

    def __exit__(self, *_: object) -> None:
        """Close nothing."""
