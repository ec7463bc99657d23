"""What adapters cost: this service with 1, 2, 4 and 8 adapters in one batch against the base model alone, in turns.

    python -m tests.bench.serve.lora_cost [--rounds 5] [--out lora_cost.json] [--quick]

One service with slots for 8 adapters (XINGLIN_MAX_LORAS=8) and 64 streams, whatever they ask: all of them the base
model, or each one of so many adapters, as many streams for each. The ratio is tokens/s of the adapters to those of the
base model in the same round.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

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
)
from tests.bench.serve.stock import BASE_MODEL
from tests.conftest import copy_products

STREAMS = 64
AIMS = {1: 0.85, 2: 0.75, 4: 0.6, 8: 0.45}
"""By the number of adapters, the ratio it should be at least."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--answers", type=int, default=4, help="of each stream in a round, one after another")
    options = parser.parse_args()
    rounds, answers = (2, 1) if options.quick else (options.rounds, options.answers)
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = copy_products(options.data_dir, Path(scratch, "data"))
        adapters = [*ADAPTERS, *publish_copies(data_dir, max(AIMS) - len(ADAPTERS))]
        service = our_side(data_dir, XINGLIN_MAX_LORAS=str(max(AIMS)))
        with running(service):
            costs = _in_turns(service, adapters, rounds, answers)
    keep(options.out, {str(adapters): [asdict(cost) for cost in found] for adapters, found in costs.items()})
    rates = {number: [cost.load.tokens_per_second for cost in found] for number, found in costs.items()}
    for number, aim in AIMS.items():
        print(f"tokens/s, {number} adapters / base model: {ratios(rates[number], rates[0])}; aim {aim}")


def _in_turns(service: Side, adapters: list[str], rounds: int, answers: int) -> dict[int, list[Cost]]:
    """By the number of adapters: 0 is the base model alone."""
    mixes = {0: [BASE_MODEL], **{number: adapters[:number] for number in AIMS}}
    costs: dict[int, list[Cost]] = {number: [] for number in mixes}
    for turn in range(rounds + 1):
        for number in [*mixes] if turn % 2 else [*mixes][::-1]:
            cost = _cost(service, mixes[number], answers if turn else 1)
            if not turn:  # what happens only once is not measured
                continue
            costs[number].append(cost)
            print(f"round {turn}, {number} adapters: {cost.load.tokens_per_second:.0f} tokens/s", flush=True)
    return costs


def _cost(service: Side, models: list[str], answers: int) -> Cost:
    cost = measured(service, [service], models, STREAMS, STREAMS * answers)
    if cost.load.failed:
        raise SystemExit(f"{cost.load.failed} answers failed: {cost.load.failures}")
    return cost


if __name__ == "__main__":
    main()
