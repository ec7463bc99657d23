"""A run that is killed at any moment and resumed has the same result, bit for bit."""

import multiprocessing
import os
import random
import time
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from adapters import PROVENANCE_FILE, AdapterRef, AdapterStore
from adapters.manifest import MANIFEST_FILE
from tests.training.jobs import SFT, load_job, run_job
from tests.training.stages.conftest import RM
from tests.training.stages.test_ppo import PPO
from training.runs.events import EVENTS_FILE, Published, Resumed, Succeeded, read_events
from training.runs.execute import begin, carry_out

KILLS = int(os.environ.get("XINGLIN_TEST_KILLS", "1"))

PREFERENCES = {
    "base_model": "models/tiny",
    "policy": "doctor@canary",
    "train_files": ["pairs.jsonl"],
    "evaluation_files": ["pairs_heldout.jsonl"],
    "learning_rate": 1e-3,
    "max_length": 256,
    "threads": 1,
    "golden": {"prompts": 8, "max_new_tokens": 6},
}
READING = {**SFT, "stage": "pt", "name": "reader", "max_steps": 8, "batch_size": 2}
JOBS: dict[str, dict[str, Any]] = {
    "pt": {**READING, "packing": True},
    "merged": {
        **READING, "merge": True, "new_tokens": ["鼻塞"], "lora": {"lora_dropout": 0.1}, "golden": {},
    },
    "sft": {**SFT, "max_steps": 10, "lora": {"lora_dropout": 0.1}},
    "4bit": {**SFT, "max_steps": 8, "quantization": "4bit", "lora": {"lora_dropout": 0.1}},
    "rm": {**RM, "max_steps": 10},
    "dpo": {**PREFERENCES, "stage": "dpo", "name": "dpo", "max_steps": 8},
    "ppo": {**PPO, "reward": "marks", "min_reward_accuracy": 0, "steps": 6, "max_new_tokens": 16},
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_kill_and_resume(trained_dir: Path, tmp_path: Path, job: str) -> None:
    config = load_job(
        copytree(trained_dir, tmp_path / "data"), {**JOBS[job], "checkpoint_every": 2, "publish": {}}
    )
    undisturbed = run_job(config, tmp_path / "data")
    for kill in range(KILLS):
        data_dir = copytree(trained_dir, tmp_path / f"killed-{kill}")
        run_id = begin(config, data_dir)
        events = data_dir / "runs" / run_id / EVENTS_FILE
        chance = random.Random(f"{job} {kill}")
        deaths = 0
        while not events.exists() or not isinstance(read_events(events)[-1], Succeeded):
            # Forked, to avoid importing torch again; the fork runs only the job.
            process = multiprocessing.get_context("fork").Process(target=_carry_out, args=(run_id, data_dir))
            process.start()
            if deaths < 2:
                _wait_for_a_checkpoint(events, chance.randrange(2 + 2 * deaths, 7), process)
                time.sleep(chance.random() * 0.3)
                process.kill()
                deaths += 1
            process.join()
        assert any(isinstance(event, Resumed) and event.step for event in read_events(events))
        published = read_events(events)[-2]
        assert isinstance(published, Published)
        assert published.ref == undisturbed.ref
        assert _made(data_dir, published.ref) == _made(tmp_path / "data", undisturbed.ref)


def _made(data_dir: Path, ref: str) -> dict[str, bytes]:
    """Return all files of a run's result, except those with its run id."""
    if ref.startswith("models/"):
        folder = data_dir / ref
    else:
        manifest = AdapterStore(data_dir / "store").get(AdapterRef.parse(ref))
        folder = AdapterStore(data_dir / "store").folder(manifest.name, manifest.revision)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert any(name.endswith(".safetensors") for name in files)
    return {name: content for name, content in files.items() if name not in (PROVENANCE_FILE, MANIFEST_FILE)}


def _carry_out(run_id: str, data_dir: Path) -> None:
    torch.set_num_threads(1)
    carry_out(run_id, data_dir)


def _wait_for_a_checkpoint(events: Path, step: int, process: Any) -> None:
    """Wait for a checkpoint at `step` or later, or the end of the process."""
    while process.is_alive():
        text = events.read_text() if events.exists() else ""
        if any(f'"event":"checkpoint","step":{one},' in text for one in range(step, 50)):
            return
        time.sleep(0.005)
