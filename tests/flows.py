"""Which files a request, an adapter and a job pass through, followed on the real parts.

    python -m tests.flows [--data-dir .cache/demo]

Prints, for each of the three flows, the files of ours in the order in which control first enters them. A return is
an entry into a file that had been left, which no call was in any longer. Entries that repeat for every token or tensor
count once. Functions of fewer than six lines are not followed: their names say what they do.
"""

import argparse
import asyncio
import contextvars
import dis
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
_PACKAGES = ("adapters", "app", "training")
_IS_FOLLOWED: contextvars.ContextVar[bool] = contextvars.ContextVar("followed", default=False)
_LEAST_LINES = 6
"""Lines of code of a function that is followed. A shorter one says with its name what it does, and is not opened."""
_YIELDS = dis.opmap["YIELD_VALUE"]


class Flow:
    """The files entered by what is followed, in order, and those that were entered again after they had been left."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.returns: list[str] = []
        self._under_way: Counter[str] = Counter()
        self._frames: dict[int, FrameType] = {}

    @contextmanager
    def followed(self) -> Iterator["Flow"]:
        """Follow this context: its calls, and those of the tasks and threads that it starts."""
        token = _IS_FOLLOWED.set(True)
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        try:
            yield self
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            _IS_FOLLOWED.reset(token)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return") or not _IS_FOLLOWED.get():
            return
        file = _ours(frame.f_code.co_filename)
        if file is None or len({line for *_, line in frame.f_code.co_lines() if line}) < _LEAST_LINES:
            return
        if event == "return":
            is_over = frame.f_code.co_code[frame.f_lasti] != _YIELDS
            if is_over and self._frames.pop(id(frame), None):
                self._under_way[file] -= 1
            return
        if id(frame) in self._frames:
            return  # a coroutine goes on
        if file not in self.files:
            self.files.append(file)
        elif not self._under_way[file] and file not in self.returns:
            self.returns.append(file)
        self._frames[id(frame)] = frame
        self._under_way[file] += 1

    def show(self, title: str) -> str:
        """As Markdown."""
        files = "\n".join(f"{number}. `{file}`" for number, file in enumerate(self.files, start=1))
        again = ", ".join(f"`{file}`" for file in self.returns) or "none"
        counts = f"{len(self.files)} files, {len(self.returns)} returns"
        return f"**{title}**: {counts}\n\n{files}\n\nEntered again: {again}.\n"


def _ours(filename: str) -> str | None:
    for package in _PACKAGES:
        if filename.startswith(f"{ROOT / package}{os.sep}"):
            return os.path.relpath(filename, ROOT)
    return None


async def _serve(data_dir: Path) -> list[str]:
    """A chat request, and an adapter from publish to pointed."""
    import httpx  # noqa: PLC0415 - after the environment

    from app.main import create_app  # noqa: PLC0415
    from app.settings import Settings  # noqa: PLC0415

    os.environ.setdefault("XINGLIN_ADMIN_KEY", "of-the-flows")
    app = create_app(Settings(data_dir=data_dir, reconcile_seconds=3600))
    shown = []
    async with app.router.lifespan_context(app) as state:
        transport = httpx.ASGITransport(_WithState(app, state))  # type: ignore[arg-type]
        headers = {"authorization": "Bearer of-the-flows"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://flows", headers=headers, timeout=300
        ) as client:
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - as a client waits
                await asyncio.sleep(0.5)
            body = {
                "model": "doctor", "stream": True, "max_tokens": 8,
                "messages": [{"role": "user", "content": "感冒有什么症状？"}],
            }  # fmt: skip
            await client.post("/v1/chat/completions", json=body)
            with Flow().followed() as flow:
                reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            shown.append(flow.show("A streamed chat request to an adapter"))
            folder = next((data_dir / "store/leaflet/revisions").iterdir())
            for name in ("one", "two"):
                with Flow().followed() as flow:
                    reply = await client.post("/v1/adapters", json={"name": name, "path": str(folder)})
                assert reply.status_code == 200, reply.text
            shown.append(flow.show("An adapter from publish to pointed"))
    return shown


class _WithState:
    """The app, with the state that a server would hand to each request."""

    def __init__(self, app: Any, state: Any) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["state"] = dict(self._state)
        await self._app(scope, receive, send)


def _train(data_dir: Path) -> str:
    """A job from its YAML to its stage."""
    from training.config import load_config  # noqa: PLC0415
    from training.runs.execute import begin, carry_out  # noqa: PLC0415
    from training.stages import sft  # noqa: PLC0415

    class Arrived(Exception):
        """The stage has been called."""

    def arrive(*_: Any) -> Path:
        raise Arrived

    sft.train = arrive
    flow = Flow()
    with flow.followed(), suppress(Arrived):
        carry_out(begin(load_config(ROOT / "training/demo/doctor.yaml", data_dir), data_dir), data_dir)
    return flow.show("A job from YAML to its stage")


def main() -> None:
    """Follow all three on a copy of the demo's data."""
    from shutil import copytree  # noqa: PLC0415

    from app.__main__ import prepare_environment  # noqa: PLC0415
    from app.engine import launch  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / ".cache/demo", help="with the demo's models")
    options = parser.parse_args()
    prepare_environment(is_quiet=True)
    if launch.is_cpu_build():
        launch.prepare()
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = copytree(options.data_dir, Path(scratch, "data"))
        shown = asyncio.run(_serve(data_dir))
        shown.append(_train(data_dir))
    print("\n".join(shown))


if __name__ == "__main__":
    main()
