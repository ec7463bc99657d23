"""Executes a job: creates the run folder, runs the stage, records events and publishes the result.

<data>/runs/<run_id>/   config.yaml  events.jsonl  tensorboard/  checkpoints/  result/
<data>/models/<name>/   base models (stage scratch, and any with `merge: true`)
<data>/store/           adapters (every other stage)
"""

import fcntl
import filecmp
import os
import secrets
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from adapters import AdapterStore
from adapters.durable import flock, replace_text
from adapters.ref import folder_name
from training.config import AdapterJob, JobConfig, dump_config, load_config, read_yaml
from training.errors import Busy, ConfigError
from training.runs import processes
from training.runs.events import (
    EVENTS_FILE,
    Cancelled,
    EventLog,
    Failed,
    Published,
    Resumed,
    Started,
    Succeeded,
    read_events,
)
from training.runs.events import Stopped as StoppedEvent
from training.runs.inputs import fixed
from training.runs.run import Run
from training.runs.stop import Stopped

CONFIG_FILE = "config.yaml"
_LOCK = ".lock"
_RESULT = "result"
# is_running() of another process holds the lock for an instant.
_TRIES, _SECONDS_BETWEEN_TRIES = 5, 0.1

# The libraries read these at their first import. Values set by the user take precedence.
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def begin(config: JobConfig, data_dir: Path) -> str:
    """Create the folder of a new run and return the run's id.

    Raises ConfigError if the base model to make exists already, or if a launcher started several processes for a stage
    that trains in one.
    """
    _check_processes(config)
    return processes.led(lambda: _make_folder(config, data_dir))


def _make_folder(config: JobConfig, data_dir: Path) -> str:
    if config.makes_base:
        _check_free(_model_folder(config, data_dir))
    # Names sort by time; the random suffix separates runs that start in the same second.
    folder = (
        data_dir
        / "runs"
        / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{folder_name(config.name)}-{secrets.token_hex(2)}"
    )
    folder.mkdir(parents=True)
    replace_text(folder / CONFIG_FILE, dump_config(config))
    return folder.name


def carry_out(run_id: str, data_dir: Path, *, join: bool = False, accept_changes: bool = False) -> Published:
    """Execute the run, or the rest of it, and publish the result.

    A run that was killed, stopped, interrupted or failed continues from its last checkpoint. Its result is bit for bit
    that of an uninterrupted run. Its inputs must not have changed since its first start, unless `accept_changes`; the
    manifest then lists the changes.

    Every end is recorded as an event and re-raised: an error as `failed`, KeyboardInterrupt as `cancelled`, a stop at a
    checkpoint as `stopped`. Publishing is atomic. Raises ConfigError if the run does not exist, has already succeeded
    or has changed inputs, and Busy if another process is working on it. With `join`, waits for that process and returns
    the result of a run that has succeeded.
    """
    folder = (data_dir / "runs" / run_id).absolute()
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"no run {run_id} in {data_dir}; `python -m training list` shows all runs")
    with _at_work(folder, wait=join) as events:
        before = processes.led(lambda: read_events(folder / EVENTS_FILE))
        if any(isinstance(event, Succeeded) for event in before):
            if join:
                return next(event for event in reversed(before) if isinstance(event, Published))
            raise ConfigError(f"{run_id} has already succeeded: nothing to resume")
        config = load_config(folder / CONFIG_FILE)
        _check_processes(config)
        run = Run(folder, events, AdapterStore(data_dir / "store"))
        if before:
            events.write(Resumed(step=run.steps_done()))
        else:
            events.write(Started(run_id=run_id, stage=config.stage, name=config.name))
        return _train_and_publish(config, run, data_dir, accept_changes)


def is_running(folder: Path) -> bool:
    """Whether a process is working on the run."""
    try:
        with (folder / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _train_and_publish(config: JobConfig, run: Run, data_dir: Path, accept_changes: bool) -> Published:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        published = _made_before(config, run, data_dir)
        if published is None:
            if processes.leads():  # may be incomplete, from a killed attempt
                shutil.rmtree(run.folder / _RESULT, ignore_errors=True)
            stage = _load_stage(config.stage)
            result = stage.train(processes.led(lambda: _with_inputs_fixed(config, run, accept_changes)), run)
            published = processes.led(lambda: _publish(config, result, data_dir))
    except KeyboardInterrupt:
        if run.stop.is_asked or run.last_checkpoint() is None:
            run.events.write(Cancelled())
            raise
        # One signal outside the training loop, usually while the result is written.
        run.events.write(StoppedEvent(step=run.steps_done()))
        raise Stopped(f"step {run.steps_done()}, before anything was published") from None
    except Stopped:
        raise
    except Exception as error:
        failed = Failed(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        run.events.write(failed)
        raise
    run.events.write(published)
    run.events.write(Succeeded())
    return published


def _with_inputs_fixed(config: JobConfig, run: Run, accept_changes: bool) -> JobConfig:
    base_folder = import_module("training.models.base_model").base_folder
    return fixed(
        config,
        run.folder,
        read_yaml(run.folder / CONFIG_FILE),
        run.store,
        lambda name, trust: base_folder(name, trust_remote_code=trust),
        accept_changes=accept_changes,
    )


def _load_stage(stage: str) -> Any:
    module = import_module(f"training.stages.{stage}")
    # Progress bars for file access would break up the bar of the training loop.
    import_module("transformers.utils.logging").disable_progress_bar()
    return module


def _check_processes(config: JobConfig) -> None:
    if processes.count() > 1 and config.in_one_process:
        raise ConfigError(
            f"stage {config.stage} trains in one process, but a launcher started {processes.count()}: run it without a "
            "launcher, as `python -m training run CONFIG`"
        )


@contextmanager
def _at_work(folder: Path, *, wait: bool) -> Iterator[EventLog]:
    """Lock the run in the leader, which alone writes its events."""
    with ExitStack() as held:

        def hold() -> None:
            held.enter_context(_locked(folder, wait=wait))

        processes.led(hold)
        yield held.enter_context(EventLog(folder / EVENTS_FILE)) if processes.leads() else processes.Unheard()


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a run; the system releases it if the process dies. Raises Busy."""
    with (folder / _LOCK).open("a") as lock:
        for tries_left in reversed(range(_TRIES)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not tries_left:
                    raise Busy(f"{folder.name} is running: another process is working on it") from error
                time.sleep(_SECONDS_BETWEEN_TRIES)
        yield


def _check_free(target: Path) -> None:
    if target.exists():
        raise ConfigError(
            f"name: there is a base model {target} already, and adapters may depend on it: choose another name or "
            "remove that folder"
        )


def _made_before(config: JobConfig, run: Run, data_dir: Path) -> Published | None:
    """Return the base model that a killed attempt of this run has already published, if any.

    Raises ConfigError if another base model has that name. Publishing an adapter twice is harmless.
    """
    if not config.makes_base:
        return None
    result, target = run.folder / _RESULT, _model_folder(config, data_dir)
    if result.is_dir() and _is_copy(target, result):
        return Published(ref=f"models/{target.name}")
    _check_free(target)
    return None


def _is_copy(copy: Path, folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    if not copy.is_dir() or {file.name for file in copy.iterdir()} != names:
        return False
    return all(filecmp.cmp(folder / name, copy / name, shallow=False) for name in names)


def _publish(config: JobConfig, result: Path, data_dir: Path) -> Published:
    if config.makes_base or not isinstance(config, AdapterJob):
        return _publish_base(result, _model_folder(config, data_dir))
    actor, why = "training", f"run {result.parent.name}"
    store = AdapterStore(data_dir / "store")
    revision = store.publish(result, config.name, actor=actor, why=why).revision
    alias = config.publish.alias
    if alias is not None:
        store.set_alias(config.name, alias, revision, actor=actor, why=why)
    return Published(ref=f"{config.name}@{revision}", alias=alias)


def _publish_base(result: Path, target: Path) -> Published:
    target.parent.mkdir(exist_ok=True)
    with flock(target.with_name(".lock")):
        _check_free(target)
        partial = target.with_name(f".{target.name}.partial")
        if partial.exists():  # from a killed run
            shutil.rmtree(partial)
        shutil.copytree(result, partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, and the server may be another user
        partial.rename(target)
    return Published(ref=f"models/{target.name}")


def _model_folder(config: JobConfig, data_dir: Path) -> Path:
    return data_dir / "models" / folder_name(config.name)
