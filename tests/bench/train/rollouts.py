"""Answers to PPO's prompts, sampled here by transformers and by a running service: how long each takes.

    XINGLIN_ADMIN_KEY=... python -m tests.bench.train.rollouts --data-dir xinglin-data --service http://127.0.0.1:8000

Needs a finished demo (`python -m training demo`) and the service on it. Both sides answer the same prompts with the
adapter `doctor`, in turn. Publishing the policy, which the service side does before each step, is timed by itself.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch

from adapters import AdapterStore
from training.artifacts.result import write_for_rollouts
from training.config import PpoConfig, load_config
from training.data import read_prompts
from training.demo.build import PIPELINE
from training.models.base_model import find_adapter, find_base
from training.models.golden import prompts_of
from training.rl.policy import Policy
from training.rl.rollouts import Rollouts
from training.runs.events import EVENTS_FILE, EventLog
from training.runs.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("xinglin-data"))
    parser.add_argument("--service", default="http://127.0.0.1:8000")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(arguments.threads)
    config = load_config(PIPELINE.parent / "doctor-ppo.yaml", root=arguments.data_dir)
    if not isinstance(config, PpoConfig):
        raise TypeError("the demo's doctor-ppo is a job of stage ppo")
    rows = read_prompts(config.train_files, config.on_error, 0)
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder) / EVENTS_FILE) as events:
        run = Run(Path(folder), events, AdapterStore(arguments.data_dir / "store"))
        base = find_base(config, run.store)
        policy = Policy(base, find_adapter(run.store, "doctor")[1])
        golden = prompts_of(rows)

        def write() -> Path:
            return write_for_rollouts(policy.model, base, config, run, rows=golden)

        print(
            "| prompts | transformers, s | service, s | publishing, s | largest difference |\n|---|---|---|---|---|"
        )
        with Rollouts(arguments.service, "bench-rollouts", policy, write) as rollouts:
            for size in arguments.batches:
                prompts = [rows[at % len(rows)]["prompt"] for at in range(size)]
                here, there, publishing, worst = [], [], [], 0.0
                for turn in range(arguments.rounds):
                    torch.manual_seed(turn)
                    at = [time.perf_counter()]
                    policy.answer(prompts, arguments.tokens)
                    at.append(time.perf_counter())
                    with torch.no_grad():
                        policy.parameters()[0].mul_(1 + 1e-6)  # another policy, as after a step
                    rollouts._publish()
                    at.append(time.perf_counter())
                    answers = rollouts.answer(prompts, arguments.tokens)
                    at.append(time.perf_counter())
                    with torch.no_grad():
                        worst = max(worst, rollouts.difference(policy.logprobs(answers)[0]))
                    here.append(at[1] - at[0])
                    publishing.append(at[2] - at[1])
                    there.append(at[3] - at[2])
                times = [f"{statistics.median(times):.2f}" for times in (here, there, publishing)]
                print(f"| {size} | {' | '.join(times)} | {worst:.1e} |", flush=True)


if __name__ == "__main__":
    main()
