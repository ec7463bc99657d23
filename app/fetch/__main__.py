"""Fetches one source or unpacks one upload, in a separate process: `python -m app.fetch`.

The job is one JSON line on stdin: `folder`, `max_bytes`, and either `archive` or `source`, `allowed` and
`private_networks`. The process reports progress as JSON lines on stdout, {"done": bytes, "total": bytes or null}. Its
last line is {"resolved": source}, with the adapter in `folder`/adapter, or {"error": message, "problems": [...]}.
If stdin closes or the parent ends, the process removes `folder` and exits.
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
    # Not sys.stdin: it reads ahead, and select() would not see the bytes in its buffer.
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            return
        line += piece
    job = json.loads(line)
    threading.Thread(target=_end_with_parent, args=(Path(job["folder"]), parent), daemon=True).start()
    os.nice(10)  # requests in progress come first
    try:
        last: dict[str, Any] = {"resolved": _carry_out(job)}
    except Exception as error:
        last = _told(error)
    _say(last)
    sys.stdout.flush()
    os._exit(0)  # before the watching thread can mistake the end of stdin for the end of the parent


def _end_with_parent(folder: Path, parent: int) -> None:
    # A child of the parent may hold stdin open, so check the parent's id too.
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], _WATCH_SECONDS)
        if readable and not os.read(0, 1):
            break
    while folder.exists():  # the transfer writes until the process ends
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
    # The network libraries are slow to import, and a transfer needs only one of them.
    if source.scheme == "hf":
        from app.fetch import hub  # noqa: PLC0415

        return hub.fetch(source, transfer)
    from app.fetch import remote  # noqa: PLC0415

    if source.scheme in ("https", "http"):
        return remote.fetch_web(source, transfer, allowed)
    return remote.fetch_objects(source, transfer)


def _told(error: Exception) -> dict[str, Any]:
    """Return the last line for an error. Messages of libraries may hold host paths, so they go to stderr."""
    refused = guard.refusal(error)
    if refused is not None:
        return {"error": str(refused), "problems": []}
    if isinstance(error, InvalidAdapter):
        return {"error": str(error), "problems": error.problems}
    if isinstance(error, TransferFailed):
        return {"error": str(error), "problems": []}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return {"error": "the data directory is full: free some space and retry", "problems": []}
    traceback.print_exception(error)
    return {"error": "internal error: see the service's log", "problems": []}


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
