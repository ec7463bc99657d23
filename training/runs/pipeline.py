"""Pipelines: several jobs, each run as soon as the jobs it depends on are done. Up-to-date results are kept.

    pipeline: huatuo
    jobs: [pt.yaml, sft.yaml, rm.yaml, ppo.yaml]     # files beside this one
    parallel: 1                                      # jobs at the same time

The dependencies of a job follow from its config: the base model and the adapters that other jobs of the pipeline make.
A pipeline may be interrupted or killed at any moment: the next call resumes unfinished jobs from their checkpoints.
"""

import fcntl
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from adapters import AdapterNotFound, AdapterRef, AdapterStore
from adapters.durable import replace_text
from adapters.ref import folder_name
from adapters.wording import in_words, no_such_setting
from training.config import STAGES, AdapterJob, JobConfig, load_config, read_yaml
from training.config.fields import Name
from training.errors import ConfigError, JobFailed
from training.runs import progress
from training.runs.execute import begin, carry_out
from training.runs.stop import EXIT_CODE, SIGNALS, Stopped

log = logging.getLogger(__name__)

_PROCESSES = multiprocessing.get_context("spawn")
_INTERRUPTED = 130


class _Asked(BaseModel, extra="forbid"):
    pipeline: Name
    jobs: Annotated[list[str], Field(min_length=1)]
    parallel: Annotated[int, Field(ge=1, le=64)] = 1


class _Note(BaseModel):
    """Progress of a job: its run, the key of its inputs, and the ref of its result when done."""

    key: str
    run_id: str
    ref: str | None = None


class _Job:
    """One job and its note on disk."""

    def __init__(self, path: Path, config: JobConfig, folder: Path, data_dir: Path) -> None:
        self.path = path
        self.config = config
        self.note_path = folder / f"{path.stem}.json"
        self.data_dir = data_dir
        self.after: list[_Job] = []
        self.key = ""
        self.turn = ""

    def makes(self, needed: Path | AdapterRef) -> bool:
        """Whether this job makes that base model or adapter."""
        if self.config.makes_base:
            return needed == (self.data_dir / "models" / self.config.name).resolve()
        return isinstance(needed, AdapterRef) and needed.name == self.config.name

    def find_key(self) -> None:
        """Compute the digest of everything that determines the result. Call it for dependencies first."""
        digest = hashlib.sha256(self.path.read_bytes())
        for job in self.after:
            digest.update(f"after {job.key}\n".encode())
        for role, sources in self.config.data.items():
            for file in (file for source in sources for file in source.files):
                with file.open("rb") as opened:
                    content = hashlib.file_digest(opened, "sha256").hexdigest()
                digest.update(f"{role} {file.name} {content}\n".encode())
        self.key = digest.hexdigest()[:16]

    @property
    def note(self) -> _Note | None:
        try:
            return _Note.model_validate_json(self.note_path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    @property
    def is_made(self) -> bool:
        note = self.note
        return note is not None and note.key == self.key and note.ref is not None and self._exists(note.ref)

    def _exists(self, ref: str) -> bool:
        if "@" not in ref:  # a base model, models/<name>
            return (self.data_dir / ref / "config.json").exists()
        try:
            AdapterStore(self.data_dir / "store").get(AdapterRef.parse(ref))
        except AdapterNotFound:
            return False
        return True

    def tell(self, what: str = "") -> None:
        """Log the job with its number in the pipeline."""
        log.info("[%s] %s (stage %s)%s", self.turn, self.config.name, self.config.stage, what)

    def make(self) -> None:
        """Start a run, or continue the unfinished one."""
        self.tell()
        note = self.note
        if note is None or not self._is_under_way(note):
            if note is not None and self.config.makes_base:  # made by this job from other inputs
                shutil.rmtree(self.data_dir / "models" / self.config.name, ignore_errors=True)
            note = _Note(key=self.key, run_id=begin(self.config, self.data_dir))
            replace_text(self.note_path, note.model_dump_json() + "\n")
        ref = carry_out(note.run_id, self.data_dir, join=True).ref
        replace_text(self.note_path, note.model_copy(update={"ref": ref}).model_dump_json() + "\n")

    def _is_under_way(self, note: _Note) -> bool:
        return note.key == self.key and note.ref is None and (self.data_dir / "runs" / note.run_id).exists()


def is_pipeline(path: Path) -> bool:
    """Whether a YAML file is a pipeline. Raises ConfigError."""
    return "pipeline" in read_yaml(path)


def run_pipeline(path: Path, data_dir: Path, root: Path | None = None) -> list[str]:
    """Run all jobs whose results are missing or outdated; return the refs of all results.

    Relative paths in the jobs' configs start from `root` (default: the current directory). A concurrent call waits for
    the first. Raises ConfigError before any job starts, JobFailed, and Stopped.
    """
    data_dir = data_dir.absolute()
    asked = _read(path)
    folder = data_dir / "pipelines" / folder_name(asked.pipeline)
    jobs = _load_jobs(path, asked, folder, data_dir, root)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for number, job in enumerate(jobs, start=1):
            job.find_key()
            job.turn = f"{number} of {len(jobs)}"
            if job.is_made:
                job.tell(": up to date")
        if asked.parallel == 1:
            _make_in_turn(jobs)
        else:
            _make_side_by_side(jobs, asked.parallel)
        return [job.note.ref for job in jobs if job.note and job.note.ref]


def _read(path: Path) -> _Asked:
    try:
        asked = _Asked.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(one)}" for one in error.errors())) from error
    names = [Path(file).stem for file in asked.jobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{path}: jobs: files need distinct names: {', '.join(sorted(twice))}")
    return asked


def _explain(problem: Any) -> str:
    field = ".".join(map(str, problem["loc"]))
    is_unknown = problem["type"] == "extra_forbidden"
    return f"{field}: {no_such_setting(field, _Asked.model_fields) if is_unknown else in_words(problem)}"


def _load_jobs(path: Path, asked: _Asked, folder: Path, data_dir: Path, root: Path | None) -> list[_Job]:
    """Load all jobs with their dependencies, which must precede them in the list."""
    files = [path.parent / file for file in asked.jobs]
    bases = [job["name"] for job in map(read_yaml, files) if _makes_base(job)]
    to_come = [(data_dir / "models" / str(name)).resolve() for name in bases]
    jobs = [_Job(file, load_config(file, root=root, to_come=to_come), folder, data_dir) for file in files]
    for at, job in enumerate(jobs):
        for needed in _needs(job.config):
            makers = [other for other in jobs if other is not job and other.makes(needed)]
            before = [other for other in makers if other in jobs[:at]]
            if before:
                job.after.append(before[-1])
                _check_alias(job, needed, before[-1])
            elif makers:
                raise ConfigError(
                    f"{path}: jobs: {job.path.name} depends on {makers[0].path.name}: list {makers[0].path.name} first"
                )
    return jobs


def _makes_base(job: dict[str, Any]) -> bool:
    """Whether a job with these raw settings makes a base model."""
    stage = STAGES.get(str(job.get("stage")))
    return stage is not None and "name" in job and stage.would_make_base(job)


def _needs(config: JobConfig) -> list[Path | AdapterRef]:
    """Return the base model and the aliases that a job depends on. A fixed revision is not a dependency."""
    if not isinstance(config, AdapterJob):
        return []
    rewards = [reward.adapter for reward in config.rewards]
    refs = [AdapterRef.parse(ref) for ref in (config.starts_from, *rewards) if ref]
    return [Path(config.base_model).resolve(), *(ref for ref in refs if ref.alias)]


def _check_alias(job: _Job, needed: Path | AdapterRef, maker: _Job) -> None:
    """Check that the dependency moves the alias that the job reads."""
    if isinstance(needed, AdapterRef) and isinstance(maker.config, AdapterJob):
        points = maker.config.publish.alias
        if points != needed.alias:
            raise ConfigError(
                f"{job.path}: depends on {needed}, but {maker.path.name} moves "
                f"{'no alias' if points is None else points}: set its publish.alias to {needed.alias}"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting: another process is running pipeline %s", folder.name)
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases the lock if that process dies
        yield


def _make_in_turn(jobs: list[_Job]) -> None:
    for job in jobs:
        if not job.is_made:
            try:
                job.make()
            except Stopped as stopped:
                raise Stopped(
                    f"{stopped} of {job.path.name}: run the same command again to continue"
                ) from None
            except Exception as error:
                raise JobFailed(f"{_failure(job)}: {type(error).__name__}: {error}") from error


def _failure(job: _Job) -> str:
    run = f" (run {job.note.run_id})" if job.note else ""
    return f"{job.path.name} did not succeed{run}"


def _make_side_by_side(jobs: list[_Job], parallel: int) -> None:
    """Run each job in its own process as soon as its dependencies are done."""
    left = [job for job in jobs if not job.is_made]
    running: dict[BaseProcess, _Job] = {}
    try:
        while left or running:
            under_way = [*left, *running.values()]
            ready = [job for job in left if not any(other in under_way for other in job.after)]
            for job in ready[: parallel - len(running)]:
                place = min(set(range(parallel)) - {int(process.name) for process in running})
                # A daemon process ends with this one, even if this one ends before the finally block.
                process: BaseProcess = _PROCESSES.Process(
                    target=_in_process, args=(job, place), name=str(place), daemon=True
                )
                process.start()
                running[process] = job
                left.remove(job)
            ended = wait([process.sentinel for process in running])
            for process in [one for one in running if one.sentinel in ended]:
                process.join()
                job = running.pop(process)
                if process.exitcode:
                    raise JobFailed(f"{_failure(job)}: exit code {process.exitcode}")
    except KeyboardInterrupt:
        _stop(running)
        if all(process.exitcode in (0, EXIT_CODE) for process in running):
            raise Stopped(
                "a checkpoint of every running job: run the same command again to continue"
            ) from None
        raise
    finally:
        _stop(running)


def _stop(running: dict[BaseProcess, _Job]) -> None:
    """Stop all running jobs at checkpoints and wait for them."""
    for process in running:
        process.terminate()
    for process in running:
        process.join()


def _in_process(job: _Job, place: int) -> None:
    progress.show_lines()
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress.stand_at(place)
    try:
        job.make()
    except Stopped:  # recorded in the run's events
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except Exception as error:  # the traceback is in the run's events
        log.error("%s: %s: %s", job.path.name, type(error).__name__, error)
        sys.exit(1)


def _end_with_parent() -> None:
    """Stop at a checkpoint when the parent dies, so that the next call can resume this job."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
