"""A pipeline of small jobs: `better` rests on `doctor`, and that and `leaflet` on `base`."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.training.jobs import BASE, SFT

JOBS: dict[str, dict[str, Any]] = {
    "base": {**BASE, "name": "new"},
    "doctor": {**SFT, "base_model": "models/new", "publish": {"alias": "default"}},
    "leaflet": {**SFT, "base_model": "models/new", "name": "leaflet", "train_files": ["plain.jsonl"]},
    "better": {
        "stage": "dpo",
        "name": "better",
        "base_model": "models/new",
        "policy": "doctor",
        "train_files": ["pairs.jsonl"],
    },
}


def lay_out(data_dir: Path, tiny_dir: Path) -> Path:
    """A data directory with the jobs, their data and a pipeline of them all."""
    data_dir.mkdir()
    for name in ("plain.jsonl", "doctor.jsonl", "heldout.jsonl"):
        shutil.copy(tiny_dir / name, data_dir)
    (data_dir / "pairs.jsonl").write_text("{}\n")
    for name, asked in JOBS.items():
        (data_dir / f"{name}.yaml").write_text(yaml.safe_dump(asked))
    write(data_dir)
    return data_dir


def write(data_dir: Path, **changes: Any) -> Path:
    asked = {"pipeline": "all", "jobs": [f"{name}.yaml" for name in JOBS], **changes}
    path = data_dir / "pipeline.yaml"
    path.write_text(yaml.safe_dump(asked))
    return path


def change(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def runs(data_dir: Path) -> int:
    return len(list((data_dir / "runs").iterdir()))
