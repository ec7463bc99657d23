"""What a job asks for: one YAML file, read into one of the configs below by its `stage`.

Relative paths in a config are relative to the current directory. Light on purpose: no torch here.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from adapters import InvalidRef
from adapters.ref import check_alias, check_name

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# What vLLM's attention takes on CPU: with another size the engine starts, and dies of its first request.
_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class ConfigError(Exception):
    """A config that cannot be run. The message names the file, each bad field and what is wrong with it."""


def _adapter_name(name: str) -> str:
    try:
        return check_name(name)
    except InvalidRef as error:
        raise ValueError(str(error)) from error


def _alias(alias: str) -> str:
    try:
        return check_alias(alias)
    except InvalidRef as error:
        raise ValueError(str(error)) from error


def _root(info: ValidationInfo) -> Path:
    return (info.context or {}).get("root") or Path.cwd()


def _data_file(path: Path, info: ValidationInfo) -> Path:
    path = _root(info) / path.expanduser()
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path


def _base_model(name: str, info: ValidationInfo) -> str:
    folder = _root(info) / Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"no such folder: {folder}; give a model folder or a Hugging Face model id")
    return name


Name = Annotated[str, AfterValidator(_adapter_name)]
DataFile = Annotated[Path, AfterValidator(_data_file)]
DataFiles = Annotated[list[DataFile], Field(min_length=1)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Lora(_Config):
    """The adapter's shape, in PEFT's own words."""

    r: int = Field(default=16, ge=1, le=512)
    """Rank. The serving engine must be started with at least this max_lora_rank."""
    lora_alpha: float = Field(default=32, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get an adapter: all but lm_head, or a list such as [q_proj, v_proj]."""


class Golden(_Config):
    """The golden prompts, by which a serving engine proves that it answers as the trainer did."""

    prompts: int = Field(default=12, ge=8, le=20)
    """How many, taken evenly from the evaluation rows, or from the training rows if there are none."""
    max_new_tokens: int = Field(default=64, ge=1, le=1024)
    """Longest greedy answer."""


class Publish(_Config):
    """What happens in the adapter store when the run succeeds."""

    alias: Annotated[str, AfterValidator(_alias)] | None = None
    """Alias to point at the new revision; a server that follows this alias loads, proves and serves it.
    None publishes the revision and moves no alias."""


class _Job(_Config):
    name: Name
    """Name of what is made: an adapter (sft) or a base model (pt)."""
    train_files: DataFiles
    """Data files to train on; research formats are recognised row by row (training/data.py)."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """`stop`: report every bad row and train on none. `skip`: report them and train on the others."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate; after a short warm-up it falls along a cosine."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in one step, on each device."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: the same config on the same machine makes the same tensors."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None leaves the choice to torch. Another number changes the last digits."""


class PtModel(_Config):
    """Size of a model built from scratch, in the words of transformers.Qwen3Config."""

    vocab_size: int = Field(default=2048, ge=300, multiple_of=64)
    """Tokens of the byte-level BPE tokenizer trained on the data."""
    hidden_size: int = Field(default=192, ge=32)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=512, ge=32)
    """Width of the feed-forward layers."""
    num_hidden_layers: int = Field(default=3, ge=1)
    """Layers."""
    num_attention_heads: int = Field(default=3, ge=1)
    """Query heads."""
    num_key_value_heads: int = Field(default=1, ge=1)
    """Key and value heads; divides num_attention_heads."""
    head_dim: int = 64
    """Size of one head; only those that the serving engine's attention takes on CPU."""
    max_position_embeddings: int = Field(default=1024, ge=64)
    """Longest context, in tokens."""
    initializer_range: float = Field(default=0.06, gt=0)
    """Standard deviation of the initial weights; small models want more than the usual 0.02."""

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if self.head_dim not in _HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {', '.join(map(str, _HEAD_DIMS))}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        return self


class PtConfig(_Job):
    """Pre-training from scratch: a tokenizer and a base model, published as a model folder."""

    stage: Literal["pt"]
    model: PtModel = PtModel()
    steps: int = Field(ge=1)
    """Optimiser steps; each takes batch_size whole documents of about equal length."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak learning rate; high, as suits a model of a few million parameters."""


class SftConfig(_Job):
    """Supervised fine-tuning: an adapter that learns to answer as the training data's assistant does."""

    stage: Literal["sft"]
    base_model: Annotated[str, AfterValidator(_base_model)]
    """Folder of the base model, or its Hugging Face id. Served adapters need the same base."""
    evaluation_files: list[DataFile] = []
    """Data files for the loss before and after training; never trained on."""
    lora: Lora = Lora()
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate; 1e-4 to 3e-4 suits models of billions of parameters."""
    epochs: float = Field(default=3, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps, instead of epochs."""
    max_length: int = Field(default=1024, ge=16)
    """Longest row in tokens; what is beyond is cut off and not learnt."""
    golden: Golden = Golden()
    publish: Publish = Publish()
    licence: str | None = None
    """Licence of the adapter, kept in its manifest."""
    notes: str | None = None
    """Anything a reader of the manifest should know."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if {"epochs", "max_steps"} <= self.model_fields_set and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both")
        names = [path.name for path in (*self.train_files, *self.evaluation_files)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"data files need different names, for the manifest: {', '.join(sorted(twice))}")
        return self


JobConfig = Annotated[PtConfig | SftConfig, Field(discriminator="stage")]
_JOB_CONFIG: TypeAdapter[PtConfig | SftConfig] = TypeAdapter(JobConfig)


def load_config(path: Path, root: Path | None = None) -> PtConfig | SftConfig:
    """Read a job's YAML file. Relative paths in it start from `root`, or else the current directory.

    Raises ConfigError naming the file and every bad field.
    """
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(asked, dict):
        raise ConfigError(f"{path}: must hold settings, such as `stage: sft`")
    try:
        return _JOB_CONFIG.validate_python(asked, context={"root": root})
    except ValidationError as error:
        problems = [f"{path}: {_explain(problem)}" for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from error


def dump_config(config: PtConfig | SftConfig) -> str:
    """The config as YAML with every default filled in; `load_config` reads it back from anywhere."""
    # epochs and max_steps exclude each other, also in what is read back.
    left_out = {"epochs"} if isinstance(config, SftConfig) and config.max_steps else set()
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude=left_out), allow_unicode=True, sort_keys=False
    )


def _explain(problem: Any) -> str:
    """One pydantic error as `field: what is wrong`."""
    stages = {"pt": PtConfig, "sft": SftConfig}
    at = list(problem["loc"])
    model: Any = stages[str(at.pop(0))] if at and at[0] in stages else None
    field = ".".join(map(str, at)) or "stage" * problem["type"].startswith("union_tag")
    if problem["type"] == "extra_forbidden":
        for part in at[:-1]:
            model = model.model_fields[part].annotation
        near = difflib.get_close_matches(str(at[-1]), model.model_fields, n=1)
        return f"{field}: no such setting" + (f"; did you mean `{near[0]}`?" if near else "")
    if problem["type"].startswith("union_tag"):
        return f"stage: give one of {', '.join(stages)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
