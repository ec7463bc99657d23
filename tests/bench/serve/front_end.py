"""The front end alone: CPU time a token of the API process, this service against stock vLLM, in turns.

    python -m tests.bench.serve.front_end [--rounds 5] [--out front_end.json] [--quick]

Both API servers are the ones that users start, `python -m app serve` and `vllm serve` with its default middlewares,
over an engine core without a model (tests/bench/serve/fake_core.py). What is counted is all CPU time of the server
process while 64 streams of 64 tokens each are asked for and sent: taking in requests, vLLM's AsyncLLM with its input
and output processing, the serving code, HTTP. Decoding what an engine core sends is not in it, which costs both sides
the same. Stock's statistics are off, as they are in the service's engine; the service's own metrics are on.
"""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree

from tests.bench.serve.load import run_load
from tests.bench.serve.sides import (
    Cost,
    Side,
    arguments,
    keep,
    measured,
    our_side,
    ratios,
    running,
    stock_side,
)
from tests.bench.serve.stock import BASE_MODEL

STREAMS = 64


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--answers", type=int, default=4, help="of each stream in a round, one after another")
    options = parser.parse_args()
    rounds, answers = (2, 1) if options.quick else (options.rounds, options.answers)
    with tempfile.TemporaryDirectory() as scratch:
        sides = [_over_fake_core(options.data_dir, Path(scratch, side), side) for side in ("ours", "stock")]
        with running(*sides):
            costs = _in_turns(sides, rounds, answers)
    keep(options.out, {side: [asdict(cost) for cost in of_side] for side, of_side in costs.items()})
    ours, stock = (
        [cost.per_token(cost.api_cpu_seconds) for cost in costs[side]] for side in ("ours", "stock")
    )
    print(f"CPU of the API process a token, ours / stock: {ratios(ours, stock)}")


def _over_fake_core(products: Path, data_dir: Path, name: str) -> Side:
    """A server with the base model alone."""
    copytree(products / "models", data_dir / "models")
    side = our_side(data_dir, OMP_NUM_THREADS="1") if name == "ours" else stock_side(data_dir, [])
    _module, *after = side.server.command[1:]
    command = ("-m", "tests.bench.serve.fake_core", name, *after)
    return replace(side, server=replace(side.server, command=command))


def _in_turns(sides: list[Side], rounds: int, answers: int) -> dict[str, list[Cost]]:
    for side in sides:  # what happens only once is not measured
        run_load(side.server.port, [BASE_MODEL], STREAMS, STREAMS)
    costs: dict[str, list[Cost]] = {side.name: [] for side in sides}
    for number in range(1, rounds + 1):
        for side in sides if number % 2 else sides[::-1]:
            cost = measured(side, sides, [BASE_MODEL], STREAMS, STREAMS * answers)
            if cost.load.failed:
                raise SystemExit(f"{side.name}: {cost.load.failed} answers failed: {cost.load.failures}")
            costs[side.name].append(cost)
            print(
                f"round {number}, {side.name}: {cost.per_token(cost.api_cpu_seconds):.1f} µs a token; "
                f"{cost.load.events / cost.load.tokens:.3f} events a token, first token p50 "
                f"{cost.load.first_token['p50'] * 1000:.0f} ms, gap p50 {cost.load.gap['p50'] * 1000:.1f} ms; "
                f"the other side idle with {cost.idle_cpu_seconds:.2f} s of CPU, the clients with "
                f"{cost.per_token(cost.load.client_cpu_seconds):.1f} µs a token",
                flush=True,
            )
    return costs


if __name__ == "__main__":
    main()
