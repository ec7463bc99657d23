"""The service's side of a transfer: starts its process, follows it, and makes sure that it ends."""

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
# A proxy is a peer like any other: a private one must be in XINGLIN_PRIVATE_NETWORKS.
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CREDENTIALS = {
    "hf": ("HF_TOKEN", "HF_ENDPOINT"),
    "s3": ("AWS_",),
    "gs": ("GOOGLE_", "GCE_METADATA_", "STORAGE_EMULATOR_HOST"),
}


class ProcessFailed(Exception):
    """The process failed. The message is fit for clients; `problems` are the faults of an invalid adapter."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


async def run(job: dict[str, Any], on_progress: Callable[[int, int | None], None]) -> str:
    """Run a job of `python -m app.fetch` and return the resolved source. Raises ProcessFailed.

    The process has always ended when this returns, raises or is cancelled.
    """
    scheme = job.get("source", "").partition("://")[0]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # its working folder holds downloaded files
        "-m",
        "app.fetch",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(scheme, Path(job["folder"])),
        cwd=job["folder"],
        limit=_LINE_BYTES,
        start_new_session=True,  # Ctrl-C goes to the service alone, which ends the process in order
    )
    complaints = asyncio.ensure_future(_last_words(process))
    try:
        last = await _follow(process, job, on_progress)
        with suppress(TimeoutError):  # stdout is closed: give it time to exit, so that its exit code is known
            await asyncio.wait_for(process.wait(), _END_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.shield(process.wait())
    if said := await complaints:
        logger.warning("messages from a transfer process:\n%s", said)
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
    """Return the end of the process's stderr, once it is closed."""
    if process.stderr is None:
        raise TypeError("it is a pipe")
    said = b""
    while piece := await process.stderr.read(_MOST_WORDS):
        said = (said + piece)[-_MOST_WORDS:]
    return said.decode(errors="replace").strip()


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"the transfer process was killed by signal {-code}: retry"
    return f"the transfer process failed with exit code {code}: see the service's log"


def environment(scheme: str, home: Path) -> dict[str, str]:
    """Return the environment of a transfer process: only the variables that its scheme needs."""
    credentials = _CREDENTIALS.get(scheme, ())
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ANY or name.upper() in _PROXIES or (credentials and name.startswith(credentials))
    }
    return {
        "AWS_EC2_METADATA_DISABLED": "true",  # the guard refuses its address anyway
        **kept,
        "PYTHONPATH": str(_ROOT),
        "HOME": str(home),  # hides the credentials, settings and caches of the service's user
        "HF_HOME": str(home / "staging"),
        "HF_HUB_DISABLE_XET": "1",  # the guard would not see its sockets, which are not Python's
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
