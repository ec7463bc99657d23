"""Builds the demo: corpus, base model and adapters. Finished work is not repeated."""

import fcntl
from pathlib import Path

from training.demo.corpus import write_corpus
from training.runs.pipeline import run_pipeline

PIPELINE = Path(__file__).parent / "pipeline.yaml"


def build_demo(data_dir: Path) -> None:
    """Make everything that is missing or was made from another corpus or config. Takes some minutes from scratch.

    It may be interrupted at any moment: the next call continues. A concurrent call waits for the first.
    """
    data_dir = data_dir.absolute()
    folder = data_dir / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases the lock if this process dies
        write_corpus(folder)
    run_pipeline(PIPELINE, data_dir, root=data_dir)
