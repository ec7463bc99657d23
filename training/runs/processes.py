"""The processes that train one job together, as a launcher started them. Rank 0 leads: it alone writes and publishes.

A launcher (`accelerate launch`, torchrun) says in the environment who is who. What all must know in the same
words, the leader tells: every process calls the functions below in the same order. Heavy imports wait until
there is somebody to talk to.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from training.runs.events import Event, EventLog

T = TypeVar("T")


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which one of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def leads() -> bool:
    """Whether this is the process that writes; a process alone leads itself."""
    return number() == 0


def led(work: Callable[[], T]) -> T:
    """What `work` returns, or raises, where it is done by the leader alone."""
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
        raise kind.__new__(kind, message)  # not by __init__, whose arguments only the leader knows
    return told[0]


def any_of(is_so: bool) -> bool:
    """Whether it is so in any of the processes."""
    if count() == 1:
        return is_so
    told: list[bool] = [False] * count()
    _distributed().all_gather_object(told, is_so)
    return any(told)


def _distributed() -> Any:
    """torch.distributed, connected."""
    import torch  # noqa: PLC0415
    from accelerate import PartialState  # noqa: PLC0415

    PartialState(cpu=not torch.cuda.is_available())  # connects the first time; the trainers take it over
    return torch.distributed


class Unheard(EventLog):
    """The events of a process that does not lead: the leader's are the run's."""

    def __init__(self) -> None:
        """Opens no file."""

    def write(self, event: Event) -> None:
        """Does nothing."""

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""
