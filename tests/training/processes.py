"""`python -m training` in processes of their own, forked from one that has imported the libraries already."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training import __main__ as command
from training.runs import execute as job
from training.runs.events import Checkpoint, Evaluation, EventLog, Published
from training.stages import sft
from training.trainers import fit as trainer

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["training.stages.sft"])


def together() -> Any:
    """In place of a context of multiprocessing: what is to be trained in two processes begins in both at once.

    By itself one may be through before the other begins.
    """
    both = FORKED.Barrier(2)

    def process(target: Callable[..., None], args: tuple[Any, ...], **options: Any) -> BaseProcess:
        return FORKED.Process(target=_together, args=(both, target, args), **options)

    return SimpleNamespace(Process=process)


def _together(both: Barrier, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    def fit_together(*given: Any) -> dict[str, float]:
        both.wait(60)
        return fit(*given)

    fit, sft.fit = sft.fit, fit_together
    target(*args)


def start(
    *arguments: object, told: Path, cwd: Path | None = None, killed_at: str | None = None
) -> BaseProcess:
    """Run one command; what it says goes to the file `told`."""
    process = FORKED.Process(target=_main, args=([*map(str, arguments)], told, cwd, killed_at))
    process.start()
    return process


def _main(arguments: list[str], told: Path, cwd: Path | None, killed_at: str | None) -> None:
    with told.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if cwd:
        os.chdir(cwd)
    if killed_at:
        MOMENTS[killed_at]()
    sys.argv = ["training", *arguments]
    code = 1
    try:
        code = command.main()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after_event(kind: type[Any], at_step: int = 0) -> Callable[[], None]:
    def patch() -> None:
        def write(self: EventLog, event: Any) -> None:
            real(self, event)
            if isinstance(event, kind) and getattr(event, "step", 0) >= at_step:
                _die()

        real, EventLog.write = EventLog.write, write  # type: ignore[method-assign]

    return patch


def _on_call(owner: Any, name: str) -> Callable[[], None]:
    return lambda: setattr(owner, name, _die)


MOMENTS = {
    "while loading": _on_call(job, "_load_stage"),
    "after the first evaluation": _after_event(Evaluation),
    "after a checkpoint inside an epoch": _after_event(Checkpoint, at_step=3),
    "after a checkpoint between epochs": _after_event(Checkpoint, at_step=6),
    "half way through a checkpoint": _on_call(trainer.Trainer, "_save_rng_state"),
    "between publishing and the alias": _on_call(job.AdapterStore, "set_alias"),
    "after publishing": _after_event(Published),
}
