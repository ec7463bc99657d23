"""The processes of this machine, as tests look at them: any may end while it is looked at."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def children(pid: int, what: str = "") -> list[int]:
    """The processes that `pid` started, with `what` in their command."""
    return _with(what, psutil.Process(pid).children())


def descendants(pid: int, what: str = "") -> list[int]:
    """The processes that `pid` started, and those that they started, with `what` in their command."""
    return _with(what, psutil.Process(pid).children(recursive=True))


@contextmanager
def computing(count: int) -> Iterator[None]:
    """So many processes that compute without end, until the block does."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


def _with(what: str, processes: list[psutil.Process]) -> list[int]:
    found = []
    for process in processes:
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # a zombie is one too
            continue
        if what in command:
            found.append(process.pid)
    return found
