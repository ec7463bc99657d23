"""What other load does to a service on a CPU, with OpenMP's idle threads spinning and asleep.

    python -m tests.bench.serve.busy [--rounds 5] [--out busy.json] [--quick]

Two services, one after the other: one whose idle threads spin as libgomp's do by default (`GOMP_SPINCOUNT=300000`, see
its manual), and one as it is. Each answers 8 streams of 64 tokens, in turns on a machine left alone and beside two
processes that compute without end. Printed are tokens a second, the median of the rounds and their range.
"""

import tempfile
from pathlib import Path
from shutil import copytree
from statistics import median

from tests.bench.serve.load import run_load
from tests.bench.serve.sides import arguments, keep, our_side, running
from tests.processes import computing

STREAMS = 8
BUSY = 2
POLICIES = {"spinning": {"GOMP_SPINCOUNT": "300000"}, "asleep": {}}


def main() -> None:
    options = arguments(__doc__).parse_args()
    rounds, requests = (1, STREAMS) if options.quick else (options.rounds, 4 * STREAMS)
    rates: dict[str, list[float]] = {}
    for policy, settings in POLICIES.items():
        with tempfile.TemporaryDirectory() as scratch:
            for part in ("models", "store"):
                copytree(options.data_dir / part, Path(scratch, part))
            side = our_side(Path(scratch), **settings)
            with running(side):
                for number in range(rounds + 1):
                    for load, count in (("quiet", 0), ("busy", BUSY)):
                        with computing(count):
                            found = run_load(side.server.port, ["xinglin-demo", "doctor"], STREAMS, requests)
                        if number:  # the first warms up
                            rates.setdefault(f"{policy}, {load}", []).append(found.tokens_per_second)
    keep(options.out, dict(rates))
    for name, found in rates.items():
        print(f"{name:16} {median(found):8.1f} tokens/s ({min(found):.1f} to {max(found):.1f})")


if __name__ == "__main__":
    main()
