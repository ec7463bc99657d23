"""From start to ready, and the memory taken then: this service against stock vLLM, in turns on the same machine.

python -m tests.bench.serve.start --rounds 5

Both get the same base model, the same adapters and the same engine settings; the service also proves its adapters
before it is ready. Needs the demo's products (`make demo` or `make test` once), and the CPU to itself.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from adapters import AdapterRef, AdapterStore
from tests.bench.serve.stock import stock_server, wait_for_health
from tests.conftest import copy_products
from tests.service import ROOT, Service, free_port

ADAPTERS = ("doctor", "doctor-ppo", "leaflet")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / ".cache" / "demo")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = copy_products(options.data_dir, Path(folder) / "data")
        for number in range(1, options.rounds + 1):
            for side, runs in found.items():
                runs.append(_ours(data_dir) if side == "ours" else _stock(data_dir))
                seconds, mebibytes = runs[-1]
                print(f"round {number}, {side}: ready after {seconds:.1f} s, {mebibytes:.0f} MiB", flush=True)
    for what, at in (("seconds to ready", 0), ("MiB at ready", 1)):
        ours, stock = ([run[at] for run in found[side]] for side in ("ours", "stock"))
        ratios = [one / other for one, other in zip(ours, stock, strict=True)]
        print(
            f"{what}: ours {statistics.median(ours):.1f}, stock {statistics.median(stock):.1f}; ratio of the rounds "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def _ours(data_dir: Path) -> tuple[float, float]:
    return _measured(Service(data_dir, free_port()), Service.wait_until_ready)


def _stock(data_dir: Path) -> tuple[float, float]:
    store = AdapterStore(data_dir / "store")
    folders = {name: store.folder(name, store.get(AdapterRef(name)).revision) for name in ADAPTERS}
    modules = (f"{name}={path}" for name, path in folders.items())
    return _measured(stock_server(data_dir, "--lora-modules", *modules), wait_for_health)


def _measured(server: Service, wait: Callable[[Service], None]) -> tuple[float, float]:
    """Seconds until `wait` ends, and the memory of all processes then in MiB, pages they share counted once."""
    began = time.perf_counter()
    server.start(until_ready=False)
    try:
        wait(server)
        seconds = time.perf_counter() - began
        kibibytes = sum(map(_proportional, [server.process.pid, *server.started()]))
    finally:
        server.stop()
    return seconds, kibibytes / 1024


def _proportional(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
