"""The whole demo in one process: corpus, base model, two adapters. Done work is never done twice."""

import fcntl
import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from adapters import AdapterNotFound, AdapterRef, AdapterStore
from training.config import PtConfig, SftConfig, load_config
from training.demo.corpus import write_corpus
from training.job import run_job

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent
JOBS = ("base", "doctor", "leaflet")  # in this order: the adapters rest on the base


class _Made(BaseModel):
    """What a job made, and from what. Written after the product is whole, removed before it is changed."""

    key: str
    ref: str


def build_demo(data_dir: Path) -> None:
    """Make what is missing or was made from another corpus or config. About two minutes from nothing.

    Interrupt it at any moment: the next call goes on with the job that was under way. A second call at
    the same time waits for the first.
    """
    data_dir = data_dir.absolute()
    folder = data_dir / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system if this process dies
        write_corpus(folder)
        base_key = ""
        for number, job in enumerate(JOBS, start=1):
            base_key = _make(job, f"{number} of {len(JOBS)}", base_key, data_dir)


def _make(job: str, place: str, base_key: str, data_dir: Path) -> str:
    """Run one job unless its product is there; returns the key of the base model."""
    path = CONFIGS / f"{job}.yaml"
    config = load_config(path, root=data_dir)
    key = _key(path, config, base_key)
    note = data_dir / "demo" / f"{job}.made.json"
    made = _read(note)
    if made is not None and made.key == key and _exists(made.ref, data_dir):
        log.info("[%s] %s: already made from this corpus and config", place, config.name)
    else:
        log.info("[%s] %s: training (stage %s)", place, config.name, config.stage)
        note.unlink(missing_ok=True)
        if isinstance(config, PtConfig):
            shutil.rmtree(data_dir / "models" / config.name, ignore_errors=True)
        ref = run_job(config, data_dir).ref
        half_written = note.with_suffix(".tmp")
        half_written.write_text(_Made(key=key, ref=ref).model_dump_json() + "\n")
        half_written.replace(note)
        log.info("[%s] %s: published as %s", place, config.name, ref)
    return base_key or key


def _key(path: Path, config: PtConfig | SftConfig, base_key: str) -> str:
    """Digest of everything the product is made from."""
    digest = hashlib.sha256(base_key.encode())
    files: list[Any] = [path, *config.train_files]
    if isinstance(config, SftConfig):
        files += config.evaluation_files
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _read(note: Path) -> _Made | None:
    try:
        return _Made.model_validate_json(note.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _exists(ref: str, data_dir: Path) -> bool:
    if ref.startswith("models/"):
        return (data_dir / ref / "config.json").exists()
    try:
        AdapterStore(data_dir / "store").get(AdapterRef.parse(ref))
    except AdapterNotFound:
        return False
    return True
