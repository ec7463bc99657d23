"""The two sides of a comparison: this service and stock vLLM, and what one load costs either.

Both have the same base model, adapters and engine settings (tests/bench/serve/stock.py). The service reserves one slot
more than its adapters in one batch, for one under proof: stock has as many slots.
"""

import argparse
import json
import random
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from adapters import AdapterRef, AdapterStore
from app.client.storm.variants import Original, variant
from tests.bench.serve.load import Load, run_load
from tests.bench.serve.stock import stock_server, wait_for_health
from tests.service import ROOT, Service, free_port

ADAPTERS = ("doctor", "leaflet", "doctor-ppo")
_MEMORY_SECONDS = 2.0
_QUIET_SECONDS = 0.5
_QUIET_SHARE = 0.1
"""Of one core, by all sides: below that, what the loads before left to do is done."""
_MOST_SECONDS = 30


@dataclass
class Side:
    """A server, and what its processes have used."""

    name: str
    server: Service
    wait: Callable[[Service], None]

    def cpu(self) -> tuple[float, float]:
        """Seconds of CPU until now: of the API process, and of all."""
        seconds = self._of_each(lambda process: sum(process.cpu_times()[:2]))
        return seconds[0], sum(seconds)

    def memory(self) -> float:
        """MiB of all processes, pages that several processes share counted by their parts."""
        return sum(self._of_each(lambda process: process.memory_full_info().pss)) / 2**20

    def _of_each(self, figure: Callable[[psutil.Process], float]) -> list[float]:
        """A figure of each process, the API process first."""
        api = psutil.Process(self.server.process.pid)
        found = [figure(api)]
        for process in api.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it ended just now
                found.append(figure(process))
        return found


@dataclass
class Cost:
    """One load of one side."""

    load: Load
    api_cpu_seconds: float
    cpu_seconds: float
    """Of all processes of the side."""
    idle_cpu_seconds: float
    """Of the other sides meanwhile, which should be none."""
    memory_mib: float
    """The most at any time."""

    def per_token(self, seconds: float) -> float:
        """Microseconds."""
        return seconds / self.load.tokens * 1e6


def our_side(data_dir: Path, **settings: str) -> Side:
    """This service with its default settings but for `settings`; not started."""
    service = Service(data_dir, free_port(), {"XINGLIN_RECONCILE_SECONDS": "1", **settings})
    return Side("ours", service, Service.wait_until_ready)


def stock_side(data_dir: Path, adapters: Sequence[str]) -> Side:
    """Stock vLLM with these adapters of the store; not started."""
    store = AdapterStore(data_dir / "store")
    folders = {name: store.folder(name, store.get(AdapterRef(name)).revision) for name in adapters}
    modules = ["--lora-modules", *(f"{name}={path}" for name, path in folders.items())] if adapters else []
    return Side("stock", stock_server(data_dir, *modules), wait_for_health)


@contextmanager
def running(*sides: Side) -> Iterator[None]:
    """Start them one after the other, and stop all."""
    with ExitStack() as started:
        for side in sides:
            side.server.start(until_ready=False)
            started.callback(side.server.stop)
            side.wait(side.server)
        yield


def measured(
    side: Side,
    sides: Sequence[Side],
    models: Sequence[str],
    streams: int,
    requests: int,
    *,
    texts: bool = False,
) -> Cost:
    """One load of `side`, of all `sides` that run.

    Raises RuntimeError if nothing was answered, or if the sides use the CPU when nobody asks.
    """
    wait_until_quiet(sides)
    others = [other for other in sides if other is not side]
    memory, ended = [side.memory()], threading.Event()
    used: list[tuple[float, ...]] = []

    def look() -> None:
        used.append((*side.cpu(), sum(other.cpu()[1] for other in others)))

    def watch() -> None:
        while not ended.wait(_MEMORY_SECONDS):
            memory.append(side.memory())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        look()
        load = run_load(side.server.port, models, streams, requests, texts=texts, on_end=look)
    finally:
        ended.set()
        watching.join()
    if not load.answers:
        raise RuntimeError(f"{side.name} answered nothing: {load.failures}; {side.server.log[-2000:]}")
    api, everything, idle = (after - before for before, after in zip(*used, strict=True))
    return Cost(load, api, everything, idle, max(*memory, side.memory()))


def wait_until_quiet(sides: Sequence[Side]) -> None:
    """Stock's worker goes on looking for work without a pause for about a second after the last there was."""
    deadline = time.monotonic() + _MOST_SECONDS
    while time.monotonic() < deadline:
        before = sum(side.cpu()[1] for side in sides)
        time.sleep(_QUIET_SECONDS)
        if sum(side.cpu()[1] for side in sides) - before < _QUIET_SHARE * _QUIET_SECONDS:
            return
    raise RuntimeError(
        f"the servers use the CPU when nobody asks, for {_MOST_SECONDS} s by now: compare them apart"
    )


def publish_copies(data_dir: Path, count: int) -> list[str]:
    """Adapters that answer as `doctor` does, each by a revision of its own; their names."""
    store = AdapterStore(data_dir / "store")
    manifest = store.get(AdapterRef("doctor"))
    original = Original(manifest, store.folder("doctor", manifest.revision))
    names = []
    for number in range(count):
        name = f"doctor-copy-{number}"
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=BytesIO(variant(original, random.Random(number)))) as archive:
                archive.extractall(folder, filter="data")
            revision = store.publish(Path(folder), name, actor="bench").revision
        store.set_alias(name, "default", revision, actor="bench")
        names.append(name)
    return names


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, default=ROOT / ".cache" / "demo", help="with the demo's products"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="for all figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="short, to see whether it runs")
    return parser


def keep(out: Path | None, figures: dict[str, Any]) -> None:
    """Write `figures` to `out`, if that is given."""
    if out:
        out.write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n")


def ratios(ours: Sequence[float], others: Sequence[float]) -> str:
    """The ratio of the rounds: its median, and from where to where."""
    found = [one / other for one, other in zip(ours, others, strict=True)]
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
