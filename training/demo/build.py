"""The whole demo: corpus, base model, adapters of every kind. Done work is never done twice."""

import fcntl
from pathlib import Path

from training.demo.corpus import write_corpus
from training.runs.pipeline import run_pipeline

PIPELINE = Path(__file__).parent / "pipeline.yaml"


def build_demo(data_dir: Path) -> None:
    """Make what is missing or was made from another corpus or config. Some minutes from nothing.

    Interrupt it at any moment: the next call goes on with what was under way. A second call at the same time
    waits for the first.
    """
    data_dir = data_dir.absolute()
    folder = data_dir / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system if this process dies
        write_corpus(folder)
    run_pipeline(PIPELINE, data_dir, root=data_dir)
