"""Inputs of a run, fixed when it starts: a revision for each ref, a digest for each file.

<run>/inputs.json stores them. Aliases may move and files may change while a run is running or stopped. A resumed run
must use the same inputs, or list the changes in the manifest.
"""

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from adapters import AdapterError, AdapterRef, AdapterStore
from adapters.durable import replace_text, sha256
from training.config import AdapterJob, JobConfig, Reward
from training.errors import ConfigError

INPUTS_FILE = "inputs.json"
_BASE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run."""

    settings: Mapping[str, Any]
    """Settings of the job."""
    files: Mapping[str, str]
    """SHA-256 of each data file, by its path."""
    refs: Mapping[str, str]
    """`name@revision` of each adapter, by the ref in the job."""
    models: Mapping[str, Mapping[str, str]]
    """SHA-256 of the files of each base and reward model, by the model's name in the job."""
    functions: Mapping[str, str]
    """SHA-256 of the file that defines each reward function, by `module:function`."""
    changed: list[str] = field(default_factory=list)
    """Changes since the run began that were accepted."""


def fixed(
    config: JobConfig,
    run: Path,
    settings: Mapping[str, Any],
    store: AdapterStore,
    model_folder: Callable[[str, bool], Path],
    *,
    accept_changes: bool,
) -> JobConfig:
    """Return the job with refs replaced by revisions, and store its inputs in `run` at the first start.

    `settings` are those of the file that `config` was read from. `model_folder` returns the folder of a model, given
    its name and whether its code is trusted. Raises ConfigError for an input that is missing and, unless
    `accept_changes`, for one that has changed since the run began.
    """
    now = _look(config, run, settings, store, model_folder)
    path = run / INPUTS_FILE
    if path.exists():
        before = read_inputs(run)
        changes = [*_changes(before, now)]
        if changes and not accept_changes:
            raise ConfigError(
                f"inputs of {run.name} have changed since it began:\n  "
                + "\n  ".join(f"{what} {how}" for what, how in changes)
                + "\nrestore them, start a new run, or accept the changes, which the manifest will list, with "
                f"`python -m training resume {run.name} --accept-changes`"
            )
        for what, how in changes:
            log.warning("accepted change: %s %s", what, how)
        now = replace(now, changed=[*before.changed, *(what for what, _ in changes)])
    replace_text(path, json.dumps(asdict(now), indent=2, ensure_ascii=False) + "\n")
    return config.pinned(now.refs)


def read_inputs(run: Path) -> Inputs:
    """Load the stored inputs of a run."""
    return Inputs(**json.loads((run / INPUTS_FILE).read_text(encoding="utf-8")))


def _look(
    config: JobConfig,
    run: Path,
    settings: Mapping[str, Any],
    store: AdapterStore,
    model_folder: Callable[[str, bool], Path],
) -> Inputs:
    models: dict[str, dict[str, str]] = {}
    rewards: Sequence[Reward] = ()
    if isinstance(config, AdapterJob):
        rewards = config.rewards
        asked = [(config.base_model, config.trust_remote_code)]
        asked += [(reward.model, reward.trust_remote_code) for reward in rewards if reward.model]
        models = {name: _digests(model_folder(name, trust)) for name, trust in asked}
    return Inputs(
        settings=settings,
        files={
            str(file): sha256(file)
            for sources in config.data.values()
            for source in sources
            for file in source.files
        },
        refs={ref: _revision(ref, store, run) for ref in _refs(config)},
        models=models,
        functions={reward.function: _function(reward.function) for reward in rewards if reward.function},
    )


def _refs(config: JobConfig) -> Iterator[str]:
    if isinstance(config, AdapterJob):
        if config.starts_from is not None:
            yield config.starts_from
        yield from (reward.adapter for reward in config.rewards if reward.adapter)


def _revision(ref: str, store: AdapterStore, run: Path) -> str:
    """Return the revision of a ref. If this run published that revision itself, return the stored one."""
    try:
        manifest = store.get(AdapterRef.parse(ref))
    except AdapterError as error:
        raise ConfigError(f"{ref}: {error}; `python -m adapters list` shows all adapters") from error
    found = manifest.ref
    return read_inputs(run).refs.get(ref, found) if manifest.run_id == run.name else found


def _digests(folder: Path) -> dict[str, str]:
    files = sorted({file for pattern in _BASE_FILES for file in folder.glob(pattern)})
    return {file.name: sha256(file) for file in files}


def _function(path: str) -> str:
    module = path.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except ImportError as error:
        raise ConfigError(f"reward: there is no {path}: {error}") from error
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise ConfigError(f"reward: there is no {path}: module not found")
    return sha256(Path(found.origin))


def _changes(before: Inputs, now: Inputs) -> Iterator[tuple[str, str]]:
    """Yield each changed input and its change. Inputs are named without local paths, for the manifest."""
    for name in _different(before.settings, now.settings):
        was, is_now = _short(before.settings.get(name)), _short(now.settings.get(name))
        yield f"setting {name}", f"changed from {was} to {is_now}"
    for path in _different(before.files, now.files):
        yield f"file {Path(path).name}", _how(before.files, now.files, path)
    for ref in _different(before.refs, now.refs):
        yield ref, f"changed from {before.refs.get(ref)} to {now.refs.get(ref)}"
    for model in dict.fromkeys([*before.models, *now.models]):
        was_files, is_files = before.models.get(model, {}), now.models.get(model, {})
        for name in _different(was_files, is_files):
            yield f"model {Path(model).name}: {name}", _how(was_files, is_files, name)
    for function in _different(before.functions, now.functions):
        yield f"reward function {function}", _how(before.functions, now.functions, function)


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *now])
    return [name for name in names if before.get(name) != now.get(name)]


def _how(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    if name not in now:
        return "is missing"
    return "has changed" if name in before else "is new"


def _short(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n...\n").strip()
