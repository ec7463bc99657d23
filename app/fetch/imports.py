"""Imports: background transfers of adapters, with their progress and results."""

import asyncio
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapters import AdapterError, InvalidAdapter
from app.errors import ApiError, BadRequest, ImportNotFound
from app.fetch import Source, checked_prefixes
from app.fetch.guard import parse_networks
from app.fetch.process import ProcessFailed, run

logger = logging.getLogger(__name__)

State = Literal["waiting", "fetching", "publishing", "done", "failed", "cancelled"]
Then = Callable[[Path, str], Awaitable[dict[str, Any]]]

_AT_ONCE = 2
_KEPT = 100
_LOCK_FILE = ".lock"
_UNEXPECTED = "internal error: see the service's log"


@dataclass
class Import:
    """One import. Times are in seconds since 1970."""

    id: str
    source: str
    state: State = "waiting"
    bytes_done: int = 0
    bytes_total: int | None = None
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    resolved: str | None = None
    """The source with its commit, once it is fetched."""
    result: dict[str, Any] | None = None
    error: str | None = None
    problems: list[str] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        """Return the fields that clients see."""
        return asdict(self)


class Imports:
    """All imports of a service. Owns `<data_dir>/imports/`, where no file outlives its transfer."""

    def __init__(
        self, data_dir: Path, *, allowed: Sequence[str], private_networks: Sequence[str], max_bytes: int
    ) -> None:
        """`allowed`: URL prefixes. Raises ValueError for an invalid prefix or network."""
        self.folder = data_dir.resolve() / "imports"
        self.max_bytes = max_bytes
        self._allowed = checked_prefixes(allowed)
        parse_networks(private_networks)
        self._private_networks = tuple(private_networks)
        self._imports: dict[str, Import] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._transfers = asyncio.Semaphore(_AT_ONCE)
        self._uploads = asyncio.Semaphore(_AT_ONCE)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._sweep()

    def _sweep(self) -> None:
        """Remove the files that a killed service left, unless they may belong to another running service."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another service uses the same data directory: not removing old files of imports")
        else:
            for left in self.folder.iterdir():
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                elif left.name != _LOCK_FILE:
                    left.unlink(missing_ok=True)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    # Imports

    def start(self, source: Source, then: Then) -> Import:
        """Fetch `source` in the background, then await `then(folder, resolved)` and keep its result."""
        one = Import(secrets.token_hex(8), source.url)
        self._imports[one.id] = one
        task = asyncio.create_task(self._carry_out(one, then), name=f"import {one.id}")
        self._tasks[one.id] = task
        task.add_done_callback(lambda task: self._finish(one, task))
        return one

    def get(self, id: str) -> Import:
        """Return an import. Raises ImportNotFound."""
        if id not in self._imports:
            raise ImportNotFound(
                f"no such import: GET /v1/imports lists those in progress and the last {_KEPT} finished ones",
                param="id",
            )
        return self._imports[id]

    def list(self) -> list[Import]:
        """Return all imports, the newest first."""
        return [*reversed(self._imports.values())]

    async def cancel(self, id: str) -> None:
        """Cancel an import and remove its files. A finished import stays as it is.

        Raises ImportNotFound, and BadRequest once it is being published.
        """
        if self.get(id).state == "publishing":
            raise BadRequest(
                "the import is being published already: wait until it is done, then roll the alias back",
                param="id",
            )
        if id in self._tasks:
            self._tasks[id].cancel()
            await asyncio.wait([self._tasks[id]])

    async def close(self) -> None:
        """Cancel all imports in progress."""
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        os.close(self._lock)

    async def _carry_out(self, one: Import, then: Then) -> None:
        def on_progress(done: int, total: int | None) -> None:
            one.bytes_done, one.bytes_total = done, total

        job = {
            "source": one.source,
            "allowed": self._allowed,
            "private_networks": self._private_networks,
            "max_bytes": self.max_bytes,
        }
        async with self._work() as work:
            async with self._transfers:
                one.state = "fetching"
                one.resolved = await run({**job, "folder": str(work)}, on_progress)
            one.state = "publishing"
            one.result = await then(work / "adapter", one.resolved)

    def _finish(self, one: Import, task: asyncio.Task[None]) -> None:
        del self._tasks[one.id]
        one.finished_at = time.time()
        # A task cancelled before its first step never runs, but still ends here.
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            one.state = "cancelled"
        elif error is None:
            one.state = "done"
        else:
            one.state = "failed"
            if isinstance(error, AdapterError | ApiError | ProcessFailed):
                one.error, one.problems = str(error), list(getattr(error, "problems", []))
            else:
                logger.error("import %s failed", one.id, exc_info=error)
                one.error = _UNEXPECTED
        finished = [id for id, kept in self._imports.items() if kept.finished_at is not None]
        for id in finished[:-_KEPT]:
            del self._imports[id]

    # Uploads

    @asynccontextmanager
    async def unpack_upload(self, archive: Path) -> AsyncIterator[Path]:
        """Unpack `archive`, an absolute path, in another process and yield its folder; remove that on leaving.

        Raises InvalidAdapter with every problem.
        """
        async with self._work() as work:
            job = {"archive": str(archive), "folder": str(work), "max_bytes": self.max_bytes}
            try:
                async with self._uploads:
                    await run(job, lambda _done, _total: None)
            except ProcessFailed as error:
                raise InvalidAdapter(error.problems or [str(error)]) from error
            yield work / "adapter"

    @asynccontextmanager
    async def _work(self) -> AsyncIterator[Path]:
        work = self.folder / secrets.token_hex(8)
        work.mkdir(mode=0o700)
        try:
            yield work
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, work, ignore_errors=True))
