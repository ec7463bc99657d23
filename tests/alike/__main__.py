"""The service against stock vLLM of the same version: the same requests to both, and what differs.

python -m tests.alike --requests 300 --seed 7

Needs the demo's products (`make demo` or `make test` once), and the CPU to itself. Exit code 1 when there is a
difference that is not deliberate.
"""

import argparse
import sys
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.alike.compare import Difference, differences, told
from tests.alike.deliberate import reason
from tests.alike.requests import Request, make_requests
from tests.alike.servers import ask_both, stock_with_adapters
from tests.bench.serve.stock import wait_for_health
from tests.conftest import copy_products
from tests.service import ROOT, Service, free_port

_EXAMPLES = 3

Found = dict[str, list[tuple[Request, Difference]]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / ".cache" / "demo")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tool-call-parser", help="of both, such as hermes; without it tools are refused")
    options = parser.parse_args()
    settings, stock_options = {}, []
    if parser_name := options.tool_call_parser:
        settings["XINGLIN_TOOL_CALL_PARSER"] = parser_name
        stock_options = ["--enable-auto-tool-choice", "--tool-call-parser", parser_name]
    with tempfile.TemporaryDirectory() as folder:
        of_stock, of_ours = (
            copy_products(options.data_dir, Path(folder) / side) for side in ("stock", "ours")
        )
        stock = stock_with_adapters(of_stock, *stock_options)
        ours = Service(of_ours, free_port(), settings)
        try:
            stock.start(until_ready=False)
            ours.start()
            wait_for_health(stock)
            return _compare(make_requests(options.requests, options.seed), stock, ours)
        finally:
            stock.stop()
            ours.stop()


def _compare(requests: list[Request], stock: Service, ours: Service) -> int:
    """Print what differs; the exit code."""
    began = time.perf_counter()
    deliberate: Found = defaultdict(list)
    others: Found = defaultdict(list)
    statuses: Counter[int] = Counter()
    for request, of_stock, of_ours in ask_both(requests, stock, ours):
        statuses[of_stock.status] += 1
        for difference in differences(of_stock, of_ours):
            if name := reason(request, difference):
                deliberate[name].append((request, difference))
            else:
                others[f"{request.path}, {difference.where}"].append((request, difference))
    counted = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    print(f"{len(requests)} requests in {time.perf_counter() - began:.0f} s; stock's answers: {counted}")
    _show("deliberate", deliberate)
    _show("not deliberate", others)
    return 1 if others else 0


def _show(title: str, found: Found) -> None:
    print(f"\n{title}: {sum(map(len, found.values()))}")
    for kind, cases in sorted(found.items()):
        print(f"  {kind}: {len(cases)}")
        for request, difference in cases[:_EXAMPLES]:
            print(textwrap.indent(told(request, difference), "    "))


if __name__ == "__main__":
    sys.exit(main())
