"""Settings of the service: environment variables named XINGLIN_*, read once by app.main."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from adapters.wording import in_words, no_such_setting

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks the engine has kernels for."""


class BaseModelSettings(BaseModel):
    """Settings of one base model: from the environment, or from its entry in the file of base models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        None,
        description="Base model: a folder or a Hugging Face id. Default: the demo base model in the data "
        "directory",
    )
    served_model_name: str | None = Field(
        None,
        description="Name that clients use for the base model. Default: the last part of its folder or id",
    )
    max_lora_rank: int = Field(16, description="Largest adapter rank; the engine reserves memory for it")
    max_loras: int = Field(
        4,
        ge=1,
        description="Adapters that may share one batch; the engine reserves memory for each, and for one being "
        "proved",
    )
    max_resident: int = Field(
        32, ge=2, description="Revisions the engine holds at once; it loads others on request"
    )
    max_resident_gib: float = Field(
        8.0, gt=0, description="Memory for the resident revisions, in GiB of adapter files"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Context length in tokens. Default: the model's own"
    )
    max_num_seqs: int = Field(64, ge=1, description="Requests that may share one batch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type in which the engine runs the base model"
    )
    kv_cache_gib: int = Field(1, ge=1, description="Size of the KV cache in GiB, CPU only")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of GPU memory to use, GPU only")
    tool_call_parser: str | None = Field(
        None,
        description="vLLM parser for the base model's tool calls: hermes, mistral, llama3_json, ... Without one, "
        "requests with tools are refused",
    )
    reasoning_parser: str | None = Field(
        None, description="vLLM parser for the base model's reasoning: qwen3, deepseek_r1, ..."
    )

    @field_validator("max_lora_rank")
    @classmethod
    def _has_kernels(cls, value: int) -> int:
        if value not in LORA_RANKS:
            raise ValueError(f"must be one of {', '.join(map(str, LORA_RANKS))}")
        return value

    @model_validator(mode="after")
    def _residents_fill_the_slots(self) -> Self:
        if self.max_resident <= self.max_loras:
            raise ValueError(
                f"max_resident is {self.max_resident} but must be above max_loras ({self.max_loras}): "
                "the adapters of a batch are resident, and one more must fit while it loads"
            )
        return self


class Settings(BaseModelSettings, BaseSettings):
    """All settings; docs/reference.py writes docs/en/settings.md from these descriptions."""

    model_config = SettingsConfigDict(env_prefix="XINGLIN_", frozen=True, extra="forbid")

    base_models: Path | None = Field(
        None,
        description="YAML file that lists several base models. Each entry has `model` and any base model setting "
        "that differs",
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Beyond loopback, chat requires the admin key too"
    )
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on")
    data_dir: Path = Field(
        Path("xinglin-data"), description="Folder for the service's data: store, admin key, models"
    )
    admin_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="Key required to change adapters. Default: generated and kept in the data directory",
    )
    publish_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Folders that POST /v1/adapters may read besides the data directory, separated by ':'",
    )
    sources: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Sources that POST /v1/adapters may fetch from: prefixes such as hf://my-org/, "
        "s3://bucket/path/, https://host/, separated by spaces",
    )
    private_networks: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Private addresses or networks that adapter downloads may connect to, separated by spaces",
    )
    max_adapter_gib: float = Field(
        2.0, gt=0, description="Largest upload or download in GiB, packed and unpacked"
    )
    allow_unproven: bool = Field(
        False, description="Serve adapters that have no golden prompts, and so cannot be proved"
    )
    allow_revisions: bool = Field(
        False,
        description="Let clients request any published revision as name@revision, even if no alias points at it",
    )
    shadow_texts: bool = Field(
        False, description="Keep the questions and answers of shadow comparisons, not only the comparison"
    )
    adapter_wait_seconds: float = Field(
        30.0,
        gt=0,
        description="Seconds a request may wait in a queue for its adapter before it fails with 503",
    )
    max_concurrent_requests: int = Field(
        256, ge=1, description="Maximum number of concurrent requests; more get 429 with Retry-After"
    )
    keep_alive_seconds: int = Field(
        90,
        ge=1,
        description="Seconds to keep an idle connection open. Keep it above the timeouts of clients and proxies "
        "(nginx and load balancers: 60 to 75 s), or a request may meet a closing connection",
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[^/?#\s]+)*$",
        description="Path under which a proxy exposes the service, such as /llm. The proxy may keep or strip it",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins that may call the service from a browser, such as https://app.example.org, or * for "
        "all, separated by spaces",
    )
    truncation: Literal["disabled", "auto"] = Field(
        "disabled",
        description="Conversations longer than the context: reject them, or drop the oldest turns (`auto`). A "
        "request may override this with `truncation`",
    )
    control_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="How to read a control token in message text, such as `<|im_start|>`: as plain text, or as "
        "the token itself (`tokens`), as other servers do",
    )
    max_logprobs: int = Field(
        20,
        ge=-1,
        description="Largest `top_logprobs` or `logprobs` a client may request; -1: the whole vocabulary",
    )
    return_tokens_as_token_ids: bool = Field(
        False,
        description="Show logprobs tokens as `token_id:N` instead of text, unless the request says otherwise",
    )
    always_usage: bool = Field(
        False, description="Report usage at the end of every stream, even if not requested"
    )
    tokenizer_info: bool = Field(
        False,
        description="Offer `GET /tokenizer_info`: the settings of the base model's tokenizer, with its chat "
        "template",
    )
    stored_responses: int = Field(
        1000,
        ge=0,
        description="Number of latest /v1/responses responses kept in memory; 0: none",
    )
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="Restart an engine that has pending requests but has produced no output for this many seconds",
    )
    reconcile_seconds: float = Field(
        1.0, gt=0, description="Seconds between checks of the store for moved aliases"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level of messages to log"
    )

    @field_validator("sources", "private_networks", "cors_origins", mode="before")
    @classmethod
    def _split_at_spaces(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("publish_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value

    def bases(self) -> list[BaseModelSettings]:
        """Return every base model to serve, each with a `model` and a `served_model_name`.

        Raises ValueError if the file cannot be read or is wrong.
        """
        common = {name: getattr(self, name) for name in BaseModelSettings.model_fields}
        if self.base_models is None:
            return [_named(BaseModelSettings(**{**common, "model": self.model or str(self.demo_base)}))]
        if self.model or self.served_model_name:
            raise ValueError(
                f"{self.base_models.name} lists the base models already: leave out XINGLIN_MODEL and "
                "XINGLIN_SERVED_MODEL_NAME, or the file"
            )
        bases = [
            _named(_entry(number, {**common, **one})) for number, one in enumerate(_entries(self.base_models))
        ]
        names = [str(base.served_model_name) for base in bases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{self.base_models.name}: two base models are named {', '.join(twice)}: give one of them "
                "another `served_model_name`"
            )
        return bases

    @property
    def demo_base(self) -> Path:
        """The folder of the demo's base model."""
        return self.data_dir / "models" / "xinglin-demo"

    @property
    def store_dir(self) -> Path:
        """The folder of the adapter store."""
        return self.data_dir / "store"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"XINGLIN_BASE_MODELS: {file.name} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"XINGLIN_BASE_MODELS: {file.name} is not YAML: {error}") from error
    if not isinstance(content, list) or not content or not all(isinstance(one, dict) for one in content):
        raise ValueError(
            f"XINGLIN_BASE_MODELS: {file.name} must be a list of base models, each `- model: FOLDER OR ID`"
        )
    return content


def _entry(number: int, fields: dict[str, Any]) -> BaseModelSettings:
    place = f"XINGLIN_BASE_MODELS: entry {number + 1}"
    if not fields["model"]:
        raise ValueError(f"{place}: model: this is required")
    try:
        return BaseModelSettings.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            meant = no_such_setting(name, BaseModelSettings.model_fields)
            raise ValueError(f"{place}: {name}: {meant}") from error
        raise ValueError(
            f"{place}: {name}: {in_words(first)}" if name else f"{place}: {in_words(first)}"
        ) from error


def _named(base: BaseModelSettings) -> BaseModelSettings:
    """Return `base` with the name that clients use, which is never a path."""
    return base.model_copy(update={"served_model_name": base.served_model_name or Path(str(base.model)).name})
