"""A tiny base model, made once by the real stage."""

from pathlib import Path

import pytest

from tests.training.jobs import BASE, SFT, LoadJob, chats, load_job, run_job
from training.demo.corpus import doctor_answer, plain_answer


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the base model `models/tiny` and the files plain.jsonl and doctor.jsonl."""
    data_dir = tmp_path_factory.mktemp("tiny")
    (data_dir / "plain.jsonl").write_text(chats(plain_answer))
    (data_dir / "doctor.jsonl").write_text(chats(doctor_answer))
    lines = (data_dir / "doctor.jsonl").read_text().splitlines(keepends=True)
    (data_dir / "heldout.jsonl").write_text("".join(lines[::4]))
    run_job(load_job(data_dir, BASE, steps=20), data_dir)
    return data_dir


@pytest.fixture
def load_base(tiny_dir: Path) -> LoadJob:
    """A `base` job on the tiny data; keyword arguments change its settings."""
    return lambda **changes: load_job(tiny_dir, BASE, **changes)


@pytest.fixture
def load_sft(tiny_dir: Path) -> LoadJob:
    """An `sft` job on the tiny base; keyword arguments change its settings."""
    return lambda **changes: load_job(tiny_dir, SFT, **changes)
