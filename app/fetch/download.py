"""Downloads one file over HTTP. Resumes or restarts it after an interruption, and counts the bytes."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx2

from app.fetch.transfer import CONNECT_SECONDS, SILENCE_SECONDS, Transfer, TransferFailed

Result = TypeVar("Result")

_RETRIES = 3
_FIRST_PAUSE_SECONDS = 0.25
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


class Interrupted(Exception):
    """The transfer was interrupted; a retry may succeed."""


def client(check_hop: Callable[[str], None]) -> httpx2.Client:
    """Return a client that calls `check_hop` with every URL, redirects included, before requesting it."""

    def hook(request: httpx2.Request) -> None:
        check_hop(str(request.url))

    timeout = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    return httpx2.Client(follow_redirects=True, timeout=timeout, event_hooks={"request": [hook]})


def retried(attempt: Callable[[], Result]) -> Result:
    """Run `attempt`, and retry it up to three times after network or server errors. Raises TransferFailed."""
    for retry in range(_RETRIES + 1):
        try:
            return attempt()
        except (httpx2.TransportError, Interrupted) as error:
            if retry == _RETRIES:
                raise TransferFailed(
                    f"the transfer failed {_RETRIES + 1} times, the last time because "
                    f"{_reason(error)}: retry later"
                ) from error
            time.sleep(_FIRST_PAUSE_SECONDS * 2**retry)
    raise AssertionError


def check_status(status: int, credentials: str) -> None:
    """Check the status. Raises Interrupted if a retry may help, TransferFailed if not."""
    if status in (401, 403):
        raise TransferFailed(f"the source refuses access (status {status}): {credentials}")
    if status in (404, 410):
        raise TransferFailed(f"the source has no such file (status {status}): check its name")
    if status in (408, 429) or status >= 500:
        raise Interrupted(f"the server answered with status {status}")
    if status not in (200, 206):
        raise TransferFailed(f"the source answered with status {status} instead of the file")


def download(
    session: httpx2.Client,
    url: str,
    target: Path,
    transfer: Transfer,
    *,
    headers: dict[str, str],
    size: int | None,
    credentials: str,
) -> None:
    """Download `url` into the new file `target`. `size` is in bytes; None: the size that the server reports.

    `credentials` is advice for the message if the server refuses access. Raises TransferFailed.
    """
    etag: str | None = None
    with target.open("xb") as file:

        def attempt() -> None:
            nonlocal etag
            ranged = _resumption(file, etag)
            with session.stream(
                "GET", url, headers={**headers, "Accept-Encoding": "identity", **ranged}
            ) as reply:
                check_status(reply.status_code, credentials)
                if reply.status_code == 200:
                    _begin_again(file, transfer)
                elif not ranged or not _begins_at(reply, file.tell()):
                    raise Interrupted("the server sent another part of the file than requested")
                etag = reply.headers.get("etag")
                length = reply.headers.get("content-length", "")
                expected = size if size is not None else _end(file, length)
                if size is None:
                    transfer.expect(expected)
                for piece in reply.iter_raw():
                    file.write(piece)
                    transfer.add(len(piece))
                if expected is not None and file.tell() != expected:
                    _begin_again(file, transfer)
                    raise Interrupted("the file did not have the announced length")

        retried(attempt)


def _resumption(file: BinaryIO, etag: str | None) -> dict[str, str]:
    """Return the headers that request the rest of a partial download, if the server sent a strong ETag."""
    if file.tell() == 0 or etag is None or etag.startswith("W/"):
        return {}
    return {"Range": f"bytes={file.tell()}-", "If-Range": etag}


def _begins_at(reply: httpx2.Response, offset: int) -> bool:
    match = _RANGE.fullmatch(reply.headers.get("content-range", ""))
    return match is not None and int(match[1]) == offset


def _begin_again(file: BinaryIO, transfer: Transfer) -> None:
    transfer.add(-file.tell())
    file.seek(0)
    file.truncate()


def _end(file: BinaryIO, length: str) -> int | None:
    return file.tell() + int(length) if length.isdigit() else None


def _reason(error: Exception) -> str:
    """Return a reason fit for clients. Messages of libraries may hold host paths and signed URLs."""
    if isinstance(error, Interrupted):
        return str(error)
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        return "the host cannot be reached"
    if isinstance(error, httpx2.TimeoutException):
        return f"no data arrived for {SILENCE_SECONDS} s"
    return "the connection was lost"
