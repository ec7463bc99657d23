"""Every stage trains on files with fewer rows than a batch."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.jobs import BASE, SFT, load_job, run_job
from tests.training.stages.conftest import RM
from tests.training.stages.test_preferences import GRPO
from tests.training.stages.test_resume import PREFERENCES

PT = {key: value for key, value in SFT.items() if key != "max_length"} | {"stage": "pt"}
ONLINE = {**GRPO, "steps": 1, "batch_size": 8, "generations": 4}
PPO = {key: value for key, value in ONLINE.items() if key != "generations"} | {
    "stage": "ppo",
    "minibatch_size": 4,
}
JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "scratch": ({**BASE, "steps": 1}, "doctor.jsonl"),
    "pt": ({**PT, "max_steps": 1}, "doctor.jsonl"),
    "sft": ({**SFT, "max_steps": 1}, "doctor.jsonl"),
    "rm": ({**RM, "max_steps": 1}, "pairs.jsonl"),
    **{
        stage: ({**PREFERENCES, "stage": stage, "max_steps": 1}, "pairs.jsonl")
        for stage in ("dpo", "kto", "orpo")
    },
    "grpo": (ONLINE, "doctor.jsonl"),
    "rloo": ({**ONLINE, "algorithm": "rloo"}, "doctor.jsonl"),
    "ppo": (PPO, "doctor.jsonl"),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stage", JOBS)
def test_a_stage_trains_with_few_rows(trained_dir: Path, stage: str, count: int) -> None:
    job, file = JOBS[stage]
    few = trained_dir / f"{count}-{file}"
    few.write_text("".join((trained_dir / file).read_text().splitlines(keepends=True)[:count]))
    changes: dict[str, Any] = {"name": f"few-{stage}-{count}", "train_files": [few.name]}
    if stage != "scratch":
        changes |= {"evaluation_files": [], "publish": {}}
    if stage not in ("scratch", "grpo", "rloo", "ppo"):
        changes["batch_size"] = 32
    assert run_job(load_job(trained_dir, job, **changes), trained_dir).ref
