"""The service's side of a transfer: start its process, follow it, and see that nothing of it stays."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]
_LINE_BYTES = 1 << 20
_MOST_WORDS = 8192
_END_SECONDS = 5.0
_ANY = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SSL_CERT_FILE", "SSL_CERT_DIR")
# A proxy is connected to like any other host: a private one must be among XINGLIN_PRIVATE_NETWORKS.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CREDENTIALS = {
    "hf": ("HF_TOKEN", "HF_ENDPOINT"),
    "s3": ("AWS_",),
    "gs": ("GOOGLE_", "GCE_METADATA_", "STORAGE_EMULATOR_HOST"),
}


class ProcessFailed(Exception):
    """The process ended with an error, fit for a client; `problems` are those of an unservable adapter."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


async def run(job: dict[str, Any], on_progress: Callable[[int, int | None], None]) -> str:
    """Carry out a job of `python -m app.fetch`; returns its source. Raises ProcessFailed.

    However this ends, cancelled too, the process has ended before.
    """
    scheme = job.get("source", "").partition("://")[0]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # the folder it runs in holds files from elsewhere
        "-m",
        "app.fetch",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(scheme, Path(job["folder"])),
        cwd=job["folder"],
        limit=_LINE_BYTES,
        start_new_session=True,  # Ctrl-C is for the service, which ends it in order
    )
    complaints = asyncio.ensure_future(_last_words(process))
    try:
        last = await _follow(process, job, on_progress)
        with suppress(
            TimeoutError
        ):  # it has closed stdout: who killed it now might miss how it ended by itself
            await asyncio.wait_for(process.wait(), _END_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.shield(process.wait())
    if said := await complaints:
        logger.warning("the process of a transfer complained:\n%s", said)
    if "resolved" in last:
        return str(last["resolved"])
    if "error" in last:
        raise ProcessFailed(last["error"], last.get("problems", []))
    raise ProcessFailed(_how_it_ended(process.returncode or 0), [])


async def _follow(
    process: asyncio.subprocess.Process, job: dict[str, Any], on_progress: Callable[[int, int | None], None]
) -> dict[str, Any]:
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise TypeError("both are pipes")
    stdin.write(json.dumps(job).encode() + b"\n")
    last: dict[str, Any] = {}
    async for line in stdout:
        last = json.loads(line)
        if "done" in last:
            on_progress(last["done"], last["total"])
    return last


async def _last_words(process: asyncio.subprocess.Process) -> str:
    """The end of what it writes to stderr, which it has closed when it has ended."""
    if process.stderr is None:
        raise TypeError("it is a pipe")
    said = b""
    while piece := await process.stderr.read(_MOST_WORDS):
        said = (said + piece)[-_MOST_WORDS:]
    return said.decode(errors="replace").strip()


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"the transfer's process was ended from outside, by signal {-code}: try again"
    return f"the transfer's process failed with exit code {code}; the service's log says why"


def environment(scheme: str, home: Path) -> dict[str, str]:
    """Only what a transfer of this scheme needs of the service's environment."""
    credentials = _CREDENTIALS.get(scheme, ())
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ANY or name.upper() in _PROXIES or (credentials and name.startswith(credentials))
    }
    return {
        "AWS_EC2_METADATA_DISABLED": "true",  # the guard refuses its address in any case
        **kept,
        "PYTHONPATH": str(_ROOT),
        "HOME": str(home),  # no credentials, settings or caches of the service's user
        "HF_HOME": str(home / "staging"),
        "HF_HUB_DISABLE_XET": "1",  # its sockets are not Python's: the guard would not see them
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
