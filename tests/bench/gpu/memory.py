"""What a job needs on a GPU and what `python -m training estimate` says it needs, side by side.

    python -m tests.bench.gpu.memory CONFIG.yaml... [--data-dir DIR]

Runs each job, in this process, and compares the most that torch reserved with the estimate, less the part of it
that no tensor holds (the CUDA context). Needs a GPU; two steps (`max_steps: 2`) of rows as long as max_length are
enough.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from adapters import AdapterStore
from training.config import load_config
from training.estimate.estimate import GIB, estimate
from training.runs.execute import begin, carry_out


def main() -> None:
    """Print one line for each job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path, help="default: one that is thrown away")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data_dir = arguments.data_dir or Path(name)
        print(f"{'job':24} {'moment':>10} {'estimate':>9} {'allocated':>10} {'reserved':>9}   GiB")
        for path in arguments.configs:
            config: Any = load_config(path)
            found = estimate(config, AdapterStore(data_dir / "store"), "cuda")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            carry_out(begin(config, data_dir), data_dir)
            tensors = found.total - found.parts["framework, allocator"]
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            print(
                f"{config.name:24} {found.moment:>10} {tensors / GIB:9.2f} {peaks[0] / GIB:10.2f} {peaks[1] / GIB:9.2f}"
            )


if __name__ == "__main__":
    main()
