"""Jobs small enough for tests, and data for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from training.config import JobConfig, load_config
from training.demo.corpus import questions
from training.demo.facts import conditions
from training.runs.events import Published
from training.runs.execute import begin, carry_out

LoadJob = Callable[..., Any]  # a JobConfig, of the stage that the test knows

BASE = {
    "stage": "scratch",
    "name": "tiny",
    "train_files": ["plain.jsonl", "doctor.jsonl"],
    "model": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
    },
    "steps": 3,
    "threads": 1,
}  # fmt: skip
SFT = {
    "stage": "sft",
    "name": "doctor",
    "base_model": "models/tiny",
    "train_files": ["doctor.jsonl"],
    "evaluation_files": ["heldout.jsonl"],
    "learning_rate": 0.01,
    "max_steps": 4,
    "max_length": 256,
    "threads": 1,
    "golden": {"prompts": 8, "max_new_tokens": 12},
    "publish": {"alias": "canary"},
    "licence": "CC0-1.0",
}


def load_job(data_dir: Path, job: dict[str, Any], **changes: Any) -> Any:
    path = data_dir / "job.yaml"
    path.write_text(yaml.safe_dump({**job, **changes}))
    return load_config(path, root=data_dir)


def run_job(config: JobConfig, data_dir: Path) -> Published:
    return carry_out(begin(config, data_dir), data_dir)


def chats(voice: Callable[..., str]) -> str:
    """48 questions and answers in one voice, as JSON Lines."""
    lines = []
    for condition in conditions()[:3]:
        for facet in ("symptoms", "care", "red_flag", "prevention"):
            for language in ("zh", "en"):
                for question in questions(condition, facet, language)[:2]:
                    answer = voice(condition, facet, language)
                    messages = [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                    lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)
