"""One execution of a job: a run folder, its events, the stage, and publishing what it made.

<data>/runs/<run_id>/   config.yaml  events.jsonl  tensorboard/  checkpoints/  result/
<data>/models/<name>/   base models (stage pt)
<data>/store/           adapters (every other stage)
"""

import os
import secrets
import shutil
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from adapters import AdapterStore
from training.config import ConfigError, PtConfig, SftConfig, dump_config
from training.events import EVENTS_FILE, Cancelled, EventLog, Failed, Published, Started, Succeeded

CONFIG_FILE = "config.yaml"

# Read by the libraries when they are first imported. What the user has set stays.
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run_job(config: PtConfig | SftConfig, data_dir: Path) -> Published:
    """Run the job and publish what it made.

    Whatever ends the run ends its events too: an error as `failed`, KeyboardInterrupt as `cancelled`, and
    both are raised on. Nothing is half published, however it ends. Raises ConfigError before the run
    begins if the base model to be made exists already.
    """
    if isinstance(config, PtConfig) and _model_folder(config, data_dir).exists():
        raise ConfigError(
            f"name: there is a base model {_model_folder(config, data_dir)} already, and adapters may rest on "
            "it; choose another name or remove that folder"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    run_dir = _new_run_dir(config.name, data_dir)
    (run_dir / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    with EventLog(run_dir / EVENTS_FILE) as events:
        events.write(Started(run_id=run_dir.name, stage=config.stage, name=config.name))
        try:
            result = _load_stage(config.stage).run(config, run_dir, events)
            published = _publish(config, result, data_dir)
        except KeyboardInterrupt:
            events.write(Cancelled())
            raise
        except Exception as error:
            events.write(Failed(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()))
            raise
        events.write(published)
        events.write(Succeeded())
    return published


def _load_stage(stage: str) -> Any:
    module = import_module(f"training.stages.{stage}")
    # Bars for reading and writing files would tear the one that shows how training goes.
    import_module("transformers.utils.logging").disable_progress_bar()
    return module


def _new_run_dir(name: str, data_dir: Path) -> Path:
    """Named so that runs sort by time, and two begun in one second differ."""
    run_dir = data_dir / "runs" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"
    run_dir.mkdir(parents=True)
    return run_dir.absolute()


def _publish(config: PtConfig | SftConfig, result: Path, data_dir: Path) -> Published:
    if isinstance(config, PtConfig):
        return _publish_base(result, _model_folder(config, data_dir))
    actor, why = "training", f"run {result.parent.name}"
    store = AdapterStore(data_dir / "store")
    revision = store.publish(result, config.name, actor=actor, why=why).revision
    alias = config.publish.alias
    if alias is not None:
        store.set_alias(config.name, alias, revision, actor=actor, why=why)
    return Published(ref=f"{config.name}@{revision}", alias=alias)


def _publish_base(result: Path, target: Path) -> Published:
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():  # of a run that was killed
        shutil.rmtree(partial)
    shutil.copytree(result, partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and the server may be another user
    partial.rename(target)
    return Published(ref=f"models/{target.name}")


def _model_folder(config: PtConfig, data_dir: Path) -> Path:
    return data_dir / "models" / config.name
