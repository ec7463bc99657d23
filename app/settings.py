"""How the service is set up: environment variables named XINGLIN_*, read once by app.main."""

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
"""What the engine has kernels for."""


class BaseModelSettings(BaseModel):
    """How one base model is served; without a file of several, the environment's are the only one's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        None,
        description="Base model: a folder or a Hugging Face id. Default: the demo base in the data directory",
    )
    served_model_name: str | None = Field(
        None, description="Name of the base model on the wire. Default: the last part of its folder or id"
    )
    max_lora_rank: int = Field(16, description="Largest rank of an adapter; memory is reserved for it")
    max_loras: int = Field(
        4,
        ge=1,
        description="Adapters that may share one batch; memory is reserved for each, and for one under proof",
    )
    max_resident: int = Field(
        32, ge=2, description="Revisions the engine holds at once; the others are loaded when asked for"
    )
    max_resident_gib: float = Field(
        8.0, gt=0, description="Memory for the weights of those, in GiB of adapter files"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Context length in tokens. Default: the model's own"
    )
    max_num_seqs: int = Field(64, ge=1, description="Requests that may share one batch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the engine"
    )
    kv_cache_gib: int = Field(1, ge=1, description="Memory for attention caches in GiB, CPU only")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory to use, GPU only"
    )
    tool_call_parser: str | None = Field(
        None,
        description="How the base model writes tool calls, by the name of vLLM's parser: hermes, mistral, llama3_json, "
        "... Without it tools are refused",
    )
    reasoning_parser: str | None = Field(
        None, description="How it marks its reasoning, by the name of vLLM's parser: qwen3, deepseek_r1, ..."
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
                f"max_resident is {self.max_resident} and must be above max_loras, which is {self.max_loras}: "
                "what shares a batch is held, and one more is being loaded"
            )
        return self


class Settings(BaseModelSettings, BaseSettings):
    """Every setting; the README's table is made of these descriptions."""

    model_config = SettingsConfigDict(env_prefix="XINGLIN_", frozen=True, extra="forbid")

    base_models: Path | None = Field(
        None,
        description="YAML file of several base models: a list of entries, each with `model` and any other setting of a "
        "base model that differs",
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. Beyond loopback, chat needs the admin key too"
    )
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on")
    data_dir: Path = Field(
        Path("xinglin-data"), description="Folder of everything the service keeps: store, key, models"
    )
    admin_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="Key for everything that changes adapters; if not set, one is made in the data directory",
    )
    publish_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Folders, separated by ':', that POST /v1/adapters may read besides the data directory",
    )
    sources: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Where POST /v1/adapters may fetch from: prefixes such as hf://my-org/, s3://bucket/path/, "
        "https://host/, separated by spaces",
    )
    private_networks: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Private addresses or networks that may be fetched from all the same, separated by spaces",
    )
    max_adapter_gib: float = Field(2.0, gt=0, description="Largest upload or download, packed and unpacked")
    allow_unproven: bool = Field(
        False, description="Serve adapters that bring no golden prompts to prove them by"
    )
    allow_revisions: bool = Field(
        False, description="Let clients name any published revision, pointed at or not, as name@revision"
    )
    shadow_texts: bool = Field(
        False, description="Keep questions and answers of shadow comparisons, and not only how they compare"
    )
    adapter_wait_seconds: float = Field(
        30.0, gt=0, description="How long a request may wait for its adapter's turn before it gets 503"
    )
    max_concurrent_requests: int = Field(
        256, ge=1, description="Requests above this get 429 with Retry-After"
    )
    keep_alive_seconds: int = Field(
        90,
        ge=1,
        description="How long an idle connection is kept. Longer than clients and proxies keep it (nginx and load "
        "balancers: 60 to 75 s), so that no request meets its closing",
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[^/?#\s]+)*$",
        description="The path under which a proxy offers the service, such as /llm. It may pass it on or take it off",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Pages that may ask the service from a browser: origins such as https://app.example.org, or * for "
        "all, separated by spaces",
    )
    truncation: Literal["disabled", "auto"] = Field(
        "disabled",
        description="Of conversations longer than the context: refuse them, or leave out the oldest turns (`auto`). "
        "Requests may say themselves: `truncation`",
    )
    control_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="What a control token in the text of a message is, such as `<|im_start|>`: its letters, or itself "
        "(`tokens`), as other servers take it",
    )
    max_logprobs: int = Field(
        20,
        ge=-1,
        description="The most `top_logprobs` or `logprobs` a client may ask for; -1: the whole vocabulary",
    )
    return_tokens_as_token_ids: bool = Field(
        False,
        description="Name the tokens of logprobs `token_id:N` and not by their text, unless a request says how",
    )
    always_usage: bool = Field(
        False, description="Tell the usage at the end of every stream, asked for or not"
    )
    tokenizer_info: bool = Field(
        False,
        description="Offer `GET /tokenizer_info`: the settings of the base model's tokenizer, with its chat template",
    )
    stored_responses: int = Field(
        1000,
        ge=0,
        description="Responses of /v1/responses that are kept in memory for their clients, the latest of them; "
        "0: none is stored",
    )
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="An engine that has requests and has written nothing for so long is ended, and another is built",
    )
    reconcile_seconds: float = Field(
        1.0, gt=0, description="How often the store is looked at for moved aliases"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="What the service logs"
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
        """Every base model to serve, each with a `model` and a `served_model_name`.

        Raises ValueError: the file cannot be read, or says what cannot be.
        """
        common = {name: getattr(self, name) for name in BaseModelSettings.model_fields}
        if self.base_models is None:
            return [_named(BaseModelSettings(**{**common, "model": self.model or str(self.demo_base)}))]
        if self.model or self.served_model_name:
            raise ValueError(
                f"{self.base_models.name} says which base models are served: leave out XINGLIN_MODEL and "
                "XINGLIN_SERVED_MODEL_NAME, or the file"
            )
        bases = [
            _named(_entry(number, {**common, **one})) for number, one in enumerate(_entries(self.base_models))
        ]
        names = [str(base.served_model_name) for base in bases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{self.base_models.name}: two base models are named {', '.join(twice)}: give one another "
                "`served_model_name`"
            )
        return bases

    @property
    def demo_base(self) -> Path:
        """Where the demo makes its base model."""
        return self.data_dir / "models" / "xinglin-demo"

    @property
    def store_dir(self) -> Path:
        """The adapter store."""
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
            f"XINGLIN_BASE_MODELS: {file.name} must be a list of base models: `- model: FOLDER OR ID` for each"
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
    """With the name of the base model on the wire, which is never a path."""
    return base.model_copy(update={"served_model_name": base.served_model_name or Path(str(base.model)).name})
