"""Value types of a config: names, refs, data sources, base models. Each validates itself."""

import glob
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from adapters import AdapterRef, InvalidRef
from adapters.ref import check_alias, check_name
from training.templates import named

_NO_DATA = re.compile(r"\.|.*\.md$|readme|licen[sc]e", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Settings(BaseModel):
    """A block of a config: rejects unknown settings and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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


def _ref(ref: str) -> str:
    try:
        return str(AdapterRef.parse(ref))
    except InvalidRef as error:
        raise ValueError(str(error)) from error


def _root(info: ValidationInfo) -> Path:
    return (info.context or {}).get("root") or Path.cwd()


def _base_model(name: str, info: ValidationInfo) -> str:
    folder = _root(info) / Path(name).expanduser()
    # A job of a pipeline may need a base that an earlier job makes.
    if folder.is_dir() or folder.resolve() in (info.context or {}).get("to_come", ()):
        return str(folder)
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"no such folder: {folder}; set a model folder or a Hugging Face model id")
    return name


def _template(name: str) -> str:
    return named(name).name


def _new_tokens(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str):
        return value
    path = _root(info) / Path(value).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: give a list or one word per line") from error
    return [line.strip() for line in lines if line.strip()]


def _distinct(tokens: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [token for token, times in Counter(tokens).items() if times > 1]:
        raise ValueError(f"duplicates: {', '.join(twice[:5])}")
    if any(token != token.strip() for token in tokens):
        raise ValueError("a token must not begin or end with white space")
    return tokens


def _without_key(url: HttpUrl) -> HttpUrl:
    if url.username or url.password:
        raise ValueError(
            "remove user and password from the URL: configs are stored with the run and sent to trackers"
        )
    return url


def _installed(tracker: str) -> str:
    found = find_spec(tracker)
    # A plain folder of that name, such as wandb's output folder, has no origin.
    if found is None or found.origin is None:
        raise ValueError(f"{tracker} is not installed: pip install {tracker}")
    return tracker


def _once(trackers: list[str]) -> list[str]:
    if len(set(trackers)) < len(trackers):
        raise ValueError("list each tracker only once")
    return trackers


Name = Annotated[str, AfterValidator(_adapter_name)]
Alias = Annotated[str, AfterValidator(_alias)]
Ref = Annotated[str, AfterValidator(_ref)]
"""`name` or `name@alias` or `name@revision` of an adapter in the store."""
BaseModelName = Annotated[str, AfterValidator(_base_model)]
"""A model folder, made absolute, or a Hugging Face id."""
TemplateName = Annotated[str, AfterValidator(_template)]
"""Name of a prompt template."""
Url = Annotated[HttpUrl, AfterValidator(_without_key)]
"""An endpoint. Its key comes from the environment, never from the URL."""
NewTokens = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=64)], ...],
    BeforeValidator(_new_tokens),
    AfterValidator(_distinct),
]
"""Words: a list, or a file with one word per line."""
Trackers = Annotated[
    list[Annotated[Literal["wandb", "trackio", "mlflow"], AfterValidator(_installed)]],
    AfterValidator(_once),
]
"""Experiment trackers; each must be installed."""


class Source(Settings):
    """Data files: one file, all files in a folder, or a glob. A bare path means a source of weight 1."""

    path: str
    """A file, a folder (the files directly in it, except a README or licence), or a glob such as `data/*.jsonl`."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each row is used per epoch: 2 means twice; 0.5 means a random half, drawn with the job's seed."""
    files: tuple[Path, ...] = Field(default=(), init=False)
    """The files that `path` matches, sorted. Not a setting."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if isinstance(value, dict) and "files" in value:
            raise ValueError("set `path` instead of `files`")
        return {"path": str(value)} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _find(self, info: ValidationInfo) -> Self:
        path = _root(info) / Path(self.path).expanduser()
        if path.is_dir():
            found = [file for file in path.iterdir() if file.is_file() and not _NO_DATA.match(file.name)]
        elif path.is_file():
            found = [path]
        else:
            path = Path(glob.escape(str(_root(info)))) / Path(self.path).expanduser()
            found = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
        if not found:
            raise ValueError(f"no such file: {path}")
        object.__setattr__(self, "path", str(path))
        object.__setattr__(self, "files", tuple(sorted(found)))
        return self

    @model_serializer
    def _dump(self) -> dict[str, Any]:
        return {"path": self.path, "weight": self.weight}


class OnError(Settings):
    """Treatment of bad rows in data files. Every bad row is reported by file, line and reason."""

    action: Literal["stop", "skip"] = "stop"
    """`stop`: do not train. `skip`: train on the other rows."""
    limit: int = Field(default=100, ge=0)
    """Maximum number of bad rows to skip; with more, the job fails."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: Any) -> Any:
        return {"action": value} if isinstance(value, str) else value
