"""This service against stock vLLM under load, by number of streams and mix of adapters, in turns.

    python -m tests.bench.serve.speed [--rounds 5] [--concurrency 1 8 64] [--models base base+2] [--out results.json]

Both have the same base model, the same adapters, the same engine settings (tests/bench/serve/sides.py) and the same
clients (tests/bench/serve/load.py). They run at the same time on the same machine, and one is loaded while the other is
idle, turn about, the first of a round now this one and now that: what else the machine does meets both. The last column
of the table is the most CPU time that the idle one took in a load, which should be next to none.

Ratios are ours / stock of one round: the median of all rounds, and from the least to the most. Memory is the most that
the processes of a side had at once, pages that several have mapped counted by their parts (PSS): those of libraries
that both sides use count half for each, so that memory alone is measured better by tests/bench/serve/start.py.

Every answer of a mix is compared with what the side itself answered to the same question alone: one of ours that
differs is an error, those of stock are counted.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.serve.load import QUESTIONS, run_load
from tests.bench.serve.sides import (
    ADAPTERS,
    Cost,
    Side,
    arguments,
    keep,
    measured,
    our_side,
    publish_copies,
    ratios,
    running,
    stock_side,
)
from tests.bench.serve.stock import BASE_MODEL
from tests.conftest import copy_products

CONCURRENCY = (1, 8, 32, 64, 128, 256)
MIXES = ("base", "base+2", "base+4")
MEASURES: dict[str, Callable[[Cost], float]] = {
    "tokens/s": lambda cost: cost.load.tokens_per_second,
    "first token p50": lambda cost: cost.load.first_token["p50"],
    "p99": lambda cost: cost.load.first_token["p99"],
    "gap p50": lambda cost: cost.load.gap["p50"],
    "gap p99": lambda cost: cost.load.gap["p99"],
    "API CPU a token": lambda cost: cost.per_token(cost.api_cpu_seconds),
    "all CPU a token": lambda cost: cost.per_token(cost.cpu_seconds),
    "memory": lambda cost: cost.memory_mib,
}
Texts = dict[tuple[str, int], str]
"""By model and question."""


@dataclass
class Setting:
    """One row of the table, with the costs of its rounds."""

    mix: str
    streams: int
    costs: dict[str, list[Cost]]
    wrong: dict[str, int]
    """Answers that differ from those given alone."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCY)
    parser.add_argument("--models", nargs="+", choices=MIXES, default=MIXES)
    parser.add_argument(
        "--no-check-answers",
        dest="check",
        action="store_false",
        help="do not compare them with those given alone",
    )
    options = parser.parse_args()
    rounds, concurrency = (2, (1, 16)) if options.quick else (options.rounds, options.concurrency)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [copy_products(options.data_dir, Path(scratch, side)) for side in ("ours", "stock")]
        (copies, _) = [publish_copies(folder, 1) for folder in folders]
        adapters = [*ADAPTERS, *copies]
        sides = our_side(folders[0]), stock_side(folders[1], adapters)
        settings = [
            Setting(mix, streams, {side.name: [] for side in sides}, {side.name: 0 for side in sides})
            for mix in options.models
            for streams in concurrency
        ]
        with running(*sides):
            alone = {side.name: _alone(side, [BASE_MODEL, *adapters]) for side in sides}
            for number in range(1, rounds + 1):
                for setting in settings:
                    models = [BASE_MODEL, *adapters[: MIXES.index(setting.mix) * 2]]
                    for side in sides if number % 2 else sides[::-1]:
                        cost = _cost(side, sides, models, setting.streams, check=options.check)
                        _keep(setting, side, cost, alone[side.name])
                        _say(number, setting, side)
                keep(options.out, _figures(settings))
    print(_table(settings))
    return int(any(setting.wrong["ours"] or _failed(setting, "ours") for setting in settings))


def _alone(side: Side, models: Sequence[str]) -> Texts:
    texts: Texts = {}
    for model in models:
        load = run_load(side.server.port, [model], 1, len(QUESTIONS), texts=True)
        if load.failed:
            raise SystemExit(f"{side.name}, asked alone: {load.failures}")
        texts |= {(model, question): text for model, question, text in load.texts}
    return texts


def _cost(side: Side, sides: Sequence[Side], models: Sequence[str], streams: int, *, check: bool) -> Cost:
    requests = max(8, min(2 * streams, 128), streams)
    return measured(side, sides, models, streams, requests, texts=check)


def _keep(setting: Setting, side: Side, cost: Cost, alone: Texts) -> None:
    setting.wrong[side.name] += sum(
        alone[model, question] != text for model, question, text in cost.load.texts
    )
    setting.costs[side.name].append(replace(cost, load=replace(cost.load, texts=[])))


def _failed(setting: Setting, side: str) -> int:
    return sum(cost.load.failed for cost in setting.costs[side])


def _say(number: int, setting: Setting, side: Side) -> None:
    cost = setting.costs[side.name][-1]
    print(
        f"round {number}, {setting.mix}, {setting.streams} streams, {side.name}: "
        f"{cost.load.tokens_per_second:.0f} tokens/s, API {cost.per_token(cost.api_cpu_seconds):.0f} µs and all "
        f"{cost.per_token(cost.cpu_seconds):.0f} µs a token; failed {cost.load.failed} {cost.load.failures[:1]}, "
        f"wrong so far {setting.wrong[side.name]}",
        file=sys.stderr,
        flush=True,
    )


def _figures(settings: Sequence[Setting]) -> dict[str, Any]:
    return {f"{setting.mix}, {setting.streams} streams": asdict(setting) for setting in settings}


def _table(settings: Sequence[Setting]) -> str:
    """Markdown: ratios, then counts of both sides."""
    columns = [*MEASURES, "wrong", "failed", "idle CPU, s"]
    rows = [
        f"| ours / stock | streams | {' | '.join(columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for setting in settings:
        ours, stock = setting.costs["ours"], setting.costs["stock"]
        cells = [ratios(list(map(figure, ours)), list(map(figure, stock))) for figure in MEASURES.values()]
        cells += [f"{setting.wrong['ours']} / {setting.wrong['stock']}"]
        cells += [f"{_failed(setting, 'ours')} / {_failed(setting, 'stock')}"]
        cells += [f"{max(cost.idle_cpu_seconds for cost in (*ours, *stock)):.2f}"]
        rows.append(f"| {setting.mix} | {setting.streams} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
