"""Kill a store change with SIGKILL at each of its steps: `python killed.py FOLDER ACTION`.

FOLDER/store is copied to FOLDER/1, FOLDER/2, ... A child process changes copy n and is killed just before its n-th
step. A step creates, writes, moves or removes a file or folder, writes half a file, takes a lock or calls fsync. The
last copy is the one whose change was completed.
"""

import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from adapters import AdapterStore
from tests.adapters.folders import NAME, WHO

ACTIONS: dict[str, Callable[[AdapterStore, Path], object]] = {
    "publish": lambda store, new: store.publish(new, NAME, actor=WHO),
    "set_alias": lambda store, _: store.set_alias(
        NAME, "default", store.revisions(NAME)[0].revision, actor=WHO
    ),
    "rollback": lambda store, _: store.rollback(NAME, actor=WHO),
    "remove_alias": lambda store, _: store.remove_alias(NAME, "default", actor=WHO),
    "split": lambda store, _: store.split(NAME, "canary", 25, actor=WHO),
    "promote": lambda store, _: store.promote(NAME, actor=WHO),
    "prune": lambda store, _: store.prune(NAME, keep=0, actor=WHO),
}


def die_before(step: int) -> None:
    left = step

    def tick(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_write or event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}:
            tick()

    def by_halves(write: Callable[..., Any], half: Callable[..., bytes], target: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            arguments[target].write_bytes(half(*arguments))
            return write(*arguments, **options)

        return call

    Path.write_text = by_halves(Path.write_text, lambda _, text: text[: len(text) // 2].encode(), 0)
    shutil.copyfile = by_halves(shutil.copyfile, lambda source, _: source.read_bytes()[:50], 1)
    os.fsync = tick  # a kill loses nothing of what was written
    flock = fcntl.flock
    fcntl.flock = lambda *arguments: (tick(), flock(*arguments))
    sys.addaudithook(audit)


def main(folder: Path, action: str) -> None:
    for step in count(1):
        copy = shutil.copytree(folder / "store", folder / str(step))
        child = os.fork()
        if child == 0:
            die_before(step)
            ACTIONS[action](AdapterStore(copy), folder / "new")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
