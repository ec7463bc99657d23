"""Services forked from one process that has imported them: by itself each imports vLLM twice, for 40 CPU seconds.

`start` is subprocess.Popen for `python -m ...`, from that process. The first who asks starts it, once for all
workers of pytest; it ends with the pytest that owns it. Nothing but imports happens in it, so that it has one thread
and what is forked from it is sound. What a service forks its engines from is forked likewise.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from app.__main__ import prepare_environment
from app.engine import launch

_IMPORTED = ("app.main", "app.banner", "app.engine.vllm", *launch.IMPORTED)
_FOLDER = "XINGLIN_TESTS_WARM"
_OWNER = "XINGLIN_TESTS_OWNER"
_MESSAGE = 1 << 16
_START_SECONDS = 240
_SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h


def own() -> None:
    """Say, before workers start, that the warm process belongs to this one."""
    os.environ[_FOLDER] = tempfile.mkdtemp(prefix="xinglin-warm-")
    os.environ[_OWNER] = str(os.getpid())


def is_owned() -> bool:
    """Whether there is somebody whom a warm process would belong to; not so in benchmarks."""
    return _OWNER in os.environ


def disown() -> None:
    """Leave nothing behind; the warm process ends with this one."""
    shutil.rmtree(os.environ.pop(_FOLDER))


class Forked:
    """As much of subprocess.Popen as tests use, for a process that is another's child."""

    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._channel = channel

    def poll(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As Popen.wait. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                told = self._channel.recv(_MESSAGE)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a forked service", timeout or 0) from None
            assert told, "the warm process has ended"
            self.returncode = int(told)
            self._channel.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As Popen.send_signal: nothing once it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path) -> Forked:
    """Run `python -m` with `arguments`; what it writes goes to the end of `log`."""
    address = _address(cwd)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(str(address))
    asked = {"arguments": list(arguments), "environment": dict(environment), "log": str(log), "cwd": str(cwd)}
    channel.send(json.dumps(asked).encode())
    return Forked(channel, int(channel.recv(_MESSAGE)))


def _address(cwd: Path) -> Path:
    """Of the warm process, which this starts if nobody has."""
    folder = Path(os.environ[_FOLDER])
    address, log = folder / "socket", folder / "log"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if address.exists():
            return address
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # it starts its threads when it is imported
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", address, os.environ[_OWNER]],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=cwd, env=environment,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not address.exists():
            assert process.poll() is None, f"the warm process ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"the warm process is not ready:\n{log.read_text()}"
            time.sleep(0.1)
        process.returncode = 0  # it is left to run, for others too, and ends with its owner: Popen would warn
        return address


def _serve(address: Path, owner: int) -> None:
    """Fork what is asked for until the owner has ended."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        selectors.DefaultSelector() as events,
    ):
        listener.bind(f"{address}.new")
        listener.listen()
        events.register(listener, selectors.EVENT_READ)
        events.register(os.pidfd_open(owner), selectors.EVENT_READ, "owner")
        os.rename(f"{address}.new", address)
        while True:
            for key, _ in events.select():
                if key.data == "owner":
                    return
                if key.fileobj is listener:
                    channel, _address = listener.accept()
                    pid = _fork(json.loads(channel.recv(_MESSAGE)))
                    channel.send(str(pid).encode())
                    events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, channel))
                else:
                    pid, channel = key.data
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with suppress(BrokenPipeError):  # who asked has ended
                        channel.send(str(code).encode())
                    channel.close()
                    events.unregister(key.fileobj)
                    os.close(key.fd)


def _fork(asked: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        _run(lambda: _become(**asked))
    return pid


def _run(target: Any) -> None:
    """In a forked process: `target`, and the end, as if Python had been started for it."""
    code = 1
    try:
        target()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(arguments: list[str], environment: Mapping[str, str], log: str, cwd: str) -> None:
    setproctitle(f"python {' '.join(arguments)}")
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    os.closerange(3, 1 << 16)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.util.spawnv_passfds = _fork_server
    _, module, *rest = arguments
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_server(path: bytes, arguments: Sequence[str], passed: Sequence[int]) -> int:
    """multiprocessing's fork server without another start of Python; all else as it starts it."""
    *_, command = arguments
    if "forkserver" not in command:
        return int(_spawn(path, arguments, passed))
    pid = os.fork()
    if pid == 0:
        setproctitle(f"python -c {command}")
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in passed:
                with suppress(OSError):
                    os.close(fd)
        _run(lambda: exec(command, {}))  # noqa: S102 - multiprocessing's own
    return pid


_spawn = multiprocessing.util.spawnv_passfds

if __name__ == "__main__":
    prepare_environment(is_quiet=True)
    for module in _IMPORTED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "an import started a thread"
    gc.collect()
    gc.freeze()
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
