"""A chat template that came with an adapter: somebody else's program, compiled and rendered out of reach.

Jinja's sandbox keeps a template from files and from Python's insides, but not from taking all time or memory, and
a single step of it may never come back. So each template has a process of its own, with limits on both; only
the adapters that bring one pay for it.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.engine.template_process import CPU_SECONDS, as_line
from app.errors import AdapterUnavailable, BadRequest, Code

_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
_LINE_BYTES = 64 << 20  # more than the longest prompt takes as JSON
_WAIT_SECONDS = 10.0
"""Renderings of one template wait for one another, and for a machine that is busy."""


class Template:
    """One template and its process, which is ended when it takes too much, and started again when asked."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def compile(self) -> None:
        """Compile it. Raises BadRequest saying what is wrong with it, AdapterUnavailable."""
        await self._in_turn(None)

    async def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt it makes of `messages` and the other variables. Raises as `compile` does."""
        return await self._in_turn(as_line(variables))

    async def close(self) -> None:
        """End its process."""
        async with self._turn:
            if self._process is not None:
                await _end(self._process)

    async def _in_turn(self, line: bytes | None) -> str:
        try:
            async with asyncio.timeout(_WAIT_SECONDS), self._turn:
                if self._process is None or self._process.returncode is not None:
                    self._process = await _start(self.text)
                return "" if line is None else await _ask(self._process, line)
        except TimeoutError as error:
            raise AdapterUnavailable(
                f"the adapter's chat template was not rendered within {_WAIT_SECONDS:g} s, which others wait for too: "
                "try again in a moment"
            ) from error


class Templates:
    """The templates of the adapters an engine holds. Adapters with the same one share its process."""

    def __init__(self) -> None:
        self._open: dict[str, Template] = {}
        self._users: Counter[str] = Counter()

    async def open(self, text: str) -> Template:
        """A template that compiles. Raises BadRequest saying why it does not, AdapterUnavailable."""
        template = self._open.setdefault(text, Template(text))
        self._users[text] += 1
        try:
            await template.compile()
        except BaseException:
            await self.close(template)
            raise
        return template

    async def close(self, template: Template) -> None:
        """Undo one `open`."""
        self._users[template.text] -= 1
        if not self._users[template.text]:
            del self._users[template.text], self._open[template.text]
            await template.close()

    async def close_all(self) -> None:
        """End all processes."""
        templates = [*self._open.values()]
        self._open.clear()
        self._users.clear()
        for template in templates:
            await template.close()


async def _start(text: str) -> Process:
    """A process that has compiled a template. Raises BadRequest."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "app.engine.template_process",
        stdin=PIPE,
        stdout=PIPE,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        | {"PYTHONPATH": str(_ROOT)},
        cwd="/",
        limit=_LINE_BYTES,
        start_new_session=True,  # Ctrl-C is for the service, which ends it in order
    )
    try:
        await _ask(process, as_line(text))
    except BaseException:
        await _end(process)
        raise
    return process


async def _ask(process: Process, line: bytes) -> str:
    """One line there and one back; a process that does not answer has ended then. Raises BadRequest."""
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise TypeError("both are pipes")
    try:
        answer = await _answer(stdin, stdout, line)
        if not answer.endswith(b"\n"):
            # It is ending by itself. Killing it now could reap it before asyncio does, and lose what it died of.
            await process.wait()
    except BaseException:
        await _end(process)
        raise
    if not answer.endswith(b"\n"):
        raise _failed(
            f"it takes more than {CPU_SECONDS:g} s of computing"
            if process.returncode == -signal.SIGPROF
            else f"its process ended by itself ({process.returncode})"
        )
    told = json.loads(answer)
    if "error" in told:
        raise _failed(told["error"])
    return str(told["text"])


async def _answer(stdin: StreamWriter, stdout: StreamReader, line: bytes) -> bytes:
    try:
        stdin.write(line)
        await stdin.drain()
        return await stdout.readline()
    except ConnectionError:
        return b""  # it ended before it read all


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await asyncio.shield(process.wait())


def _failed(reason: str) -> BadRequest:
    return BadRequest(
        f"the adapter's chat template cannot be rendered: {reason}", code=Code.CHAT_TEMPLATE_FAILED
    )
