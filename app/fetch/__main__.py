"""One transfer, or the unpacking of one upload, in a process of its own: `python -m app.fetch`.

The job is one JSON line on stdin: `folder`, `max_bytes`, and either `archive` or `source`, `allowed` and
`private_networks`. JSON lines on stdout say {"done": bytes, "total": bytes or null}, and in the end
{"resolved": source} or {"error": message, "problems": [...]}. The adapter is in `folder`/adapter then.
When stdin ends or the parent does, `folder` is removed.
"""

import errno
import json
import os
import select
import shutil
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from adapters import InvalidAdapter
from app.fetch import guard
from app.fetch.source import Source, parse_source
from app.fetch.transfer import Transfer, TransferFailed

_WATCH_SECONDS = 1.0


def main() -> None:
    parent = os.getppid()
    # Not sys.stdin: what it has read ahead could not be seen by select().
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return
        line += piece
    job = json.loads(line)
    threading.Thread(target=_end_with_parent, args=(Path(job["folder"]), parent), daemon=True).start()
    os.nice(10)  # requests under way come first
    try:
        last: dict[str, Any] = {"resolved": _carry_out(job)}
    except Exception as error:
        last = _told(error)
    _say(last)
    sys.stdout.flush()
    os._exit(0)  # before the watching thread can take the end of stdin for the end of the parent


def _end_with_parent(folder: Path, parent: int) -> None:
    # Something the parent has forked may hold the other end of stdin open, so its id is looked at too.
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], _WATCH_SECONDS)
        if readable and not os.read(0, 1):
            break
    while folder.exists():  # the transfer goes on writing until the process ends
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _carry_out(job: dict[str, Any]) -> str:
    work = Path(job["folder"])
    transfer = Transfer(
        folder=work / "adapter",
        staging=work / "staging",
        max_bytes=job["max_bytes"],
        report=lambda done, total: _say({"done": done, "total": total}),
    )
    transfer.folder.mkdir()
    transfer.staging.mkdir()
    try:
        if "archive" in job:
            from adapters.archive import unpack  # noqa: PLC0415

            unpack(Path(job["archive"]), transfer.folder, max_bytes=transfer.max_bytes)
            return "upload"
        guard.install(job["private_networks"])
        return _fetch(parse_source(job["source"], job["allowed"]), transfer, job["allowed"])
    finally:
        shutil.rmtree(transfer.staging)


def _fetch(source: Source, transfer: Transfer, allowed: list[str]) -> str:
    # The network libraries take their time to import, and each transfer needs one of them.
    if source.scheme == "hf":
        from app.fetch import hub  # noqa: PLC0415

        return hub.fetch(source, transfer)
    from app.fetch import remote  # noqa: PLC0415

    if source.scheme in ("https", "http"):
        return remote.fetch_web(source, transfer, allowed)
    return remote.fetch_objects(source, transfer)


def _told(error: Exception) -> dict[str, Any]:
    """The last line for an error: what libraries say goes to stderr, for it can hold host paths."""
    refused = guard.refusal(error)
    if refused is not None:
        return {"error": str(refused), "problems": []}
    if isinstance(error, InvalidAdapter):
        return {"error": str(error), "problems": error.problems}
    if isinstance(error, TransferFailed):
        return {"error": str(error), "problems": []}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return {"error": "the data directory is full: make room and try again", "problems": []}
    traceback.print_exception(error)
    return {"error": "the service failed on this; its log says why", "problems": []}


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
