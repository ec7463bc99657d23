"""What other load does to training on a CPU, with OpenMP's idle threads spinning and asleep.

    python -m tests.bench.train.busy [--rounds 3] [--steps 60]

The same small AdamW loop in a process of its own, in turns: with `OMP_WAIT_POLICY` as it is by default and `passive`,
as the product sets it, on a machine left alone and beside two processes that compute without end. Printed are steps a
second, the median of the rounds and their range. All make the same weights, bit for bit, or the script fails.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from tests.processes import computing

SIZES = {"small": (64, 4, 128), "large": (256, 8, 512)}
"""Width, rows, and tokens of a row."""

_LOOP = """
import hashlib, json, sys, time
import torch
width, rows, length, steps = map(int, sys.argv[1:])
torch.set_num_threads(2)
torch.manual_seed(0)
layer = lambda: torch.nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
model = torch.nn.Sequential(layer(), layer(), torch.nn.Linear(width, width))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = torch.randn(rows, length, width)
for step in range(steps + 3):
    if step == 3:
        started = time.perf_counter()
    optimiser.zero_grad()
    ((model(data) - data) ** 2).mean().backward()
    optimiser.step()
seconds = time.perf_counter() - started
weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
print(json.dumps([steps / seconds, hashlib.sha256(weights).hexdigest()]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    for size in SIZES:
        rates: dict[tuple[str, str], list[float]] = {}
        digests = set()
        for _ in range(options.rounds):
            for load in ("quiet", "busy"):
                with computing(2 if load == "busy" else 0):
                    for policy in ("default", "passive"):
                        steps = options.steps if size == "small" else options.steps // 4
                        rate, digest = _run(size, policy, steps)
                        rates.setdefault((load, policy), []).append(rate)
                        digests.add(digest)
        if len(digests) != 1:
            raise SystemExit(f"{size}: the weights differ")
        for (load, policy), found in rates.items():
            spread = f"{min(found):.2f} to {max(found):.2f}"
            print(f"{size:6} {load:6} {policy:8} {statistics.median(found):8.2f} steps/s ({spread})")


def _run(size: str, policy: str, steps: int) -> tuple[float, str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy == "passive":
        environment["OMP_WAIT_POLICY"] = "passive"
    command = [sys.executable, "-c", _LOOP, *map(str, (*SIZES[size], steps))]
    rate, digest = json.loads(
        subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    )
    return rate, digest


if __name__ == "__main__":
    main()
