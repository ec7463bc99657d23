"""The processes of this machine, as tests look at them: any may end while it is looked at."""

import psutil


def descendants(pid: int, what: str = "") -> list[int]:
    """The processes that `pid` started, and those that they started, with `what` in their command."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:  # a zombie is one too
            continue
        if what in command:
            found.append(process.pid)
    return found


def cpu_seconds(pid: int) -> float:
    """What `pid`, the processes it waited for and those it has now have used. Waiting for others' work is not in it."""
    process = psutil.Process(pid)
    seconds = sum(process.cpu_times()[:4])  # of its own and of its children that ended, in user and in system
    for child in process.children(recursive=True):
        try:
            seconds += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return seconds
