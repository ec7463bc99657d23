"""Reads a job's YAML file into the config of its stage, and reports every bad field at once."""

import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from adapters.wording import in_words, no_such_setting
from training.config.job import Job
from training.config.stages import JobConfig
from training.errors import ConfigError

_JOB_CONFIG: TypeAdapter[JobConfig] = TypeAdapter(Annotated[JobConfig, Field(discriminator="stage")])
STAGES: dict[str, type[Job]] = {
    typing.get_args(config.model_fields["stage"].annotation)[0]: config
    for config in typing.get_args(JobConfig)
}


def load_config(path: Path, root: Path | None = None, *, to_come: Collection[Path] = ()) -> JobConfig:
    """Load a job's YAML file. Relative paths in it start from `root` (default: the current directory).

    `to_come`: resolved model folders that will exist when the job runs. Raises ConfigError that names the file and
    every bad field.
    """
    asked = read_yaml(path)
    try:
        return _JOB_CONFIG.validate_python(asked, context={"root": root, "to_come": to_come})
    except ValidationError as error:
        problems = [f"{path}: {_explain(problem)}" for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file. Raises ConfigError."""
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(asked, dict):
        raise ConfigError(f"{path}: must contain settings, such as `stage: sft`")
    return asked


def dump_config(config: JobConfig) -> str:
    """Return the config as YAML, with defaults filled in and paths absolute."""
    return yaml.safe_dump(config.settings(), allow_unicode=True, sort_keys=False)


def _explain(problem: Any) -> str:
    """Format a pydantic error as `field: problem`."""
    at = list(problem["loc"])
    model: Any = STAGES[str(at.pop(0))] if at and at[0] in STAGES else None
    field = ".".join(map(str, at)) or "stage" * problem["type"].startswith("union_tag")
    if problem["type"] == "extra_forbidden":
        return f"{field}: {no_such_setting(str(at[-1]), _fields(model, at[:-1]))}"
    if problem["type"].startswith("union_tag"):
        return f"stage: must be one of {', '.join(STAGES)}"
    return f"{field}: {in_words(problem)}" if field else in_words(problem)


def _fields(model: Any, path: list[str | int]) -> list[str]:
    """Return the settings of the block at `path`."""
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        blocks = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
        model = next((kind for kind in blocks if issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
