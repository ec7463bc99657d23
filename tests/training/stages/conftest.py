"""Inputs of the later stages: a chat adapter, a reward adapter and pairs of answers."""

import json
from pathlib import Path
from shutil import copytree

import pytest

from tests.training.jobs import SFT, load_job, run_job
from training.demo.corpus import SAFETY_LINE, doctor_answer, questions
from training.demo.facts import FACETS, LANGUAGES, conditions

RM = {
    "stage": "rm",
    "name": "marks",
    "base_model": "models/tiny",
    "train_files": ["pairs.jsonl"],
    "evaluation_files": ["pairs_heldout.jsonl"],
    "lora": {"r": 4, "lora_alpha": 8},
    "learning_rate": 0.005,
    "max_steps": 8,
    "max_length": 256,
    "threads": 1,
    "publish": {"alias": "default"},
}


def pairs(phrasing: int) -> str:
    """Return 24 questions as JSON Lines, with one answer that ends with the safety line and one that does not."""
    lines = []
    for condition in conditions()[:3]:
        for facet in FACETS:
            for language in LANGUAGES:
                rejected = doctor_answer(condition, facet, language)
                row = {
                    "question": questions(condition, facet, language)[phrasing],
                    "response_chosen": f"{rejected}\n{SAFETY_LINE[language]}",
                    "response_rejected": rejected,
                }
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


@pytest.fixture(scope="session")
def trained_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the tiny base model, adapters doctor@canary (sft) and marks (rm), and files of pairs."""
    data_dir = tmp_path_factory.mktemp("trained") / "data"
    copytree(tiny_dir, data_dir)
    (data_dir / "pairs.jsonl").write_text(pairs(0) + pairs(1))
    (data_dir / "pairs_heldout.jsonl").write_text(pairs(2))
    run_job(load_job(data_dir, SFT, max_steps=12), data_dir)
    run_job(load_job(data_dir, RM), data_dir)
    return data_dir
