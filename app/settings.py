"""How the service is set up: environment variables named XINGLIN_*, read once by app.main."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What the engine has kernels for."""


class Settings(BaseSettings):
    """Every setting; the README's table is made of these descriptions."""

    model_config = SettingsConfigDict(env_prefix="XINGLIN_", frozen=True, extra="forbid")

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
    model: str | None = Field(
        None,
        description="Base model: a folder or a Hugging Face id. Default: the demo base in the data directory",
    )
    served_model_name: str | None = Field(
        None, description="Name of the base model on the wire. Default: the last part of its folder or id"
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
    adapter_wait_seconds: float = Field(
        30.0, gt=0, description="How long a request may wait for its adapter's turn before it gets 503"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Context length in tokens. Default: the model's own"
    )
    max_num_seqs: int = Field(64, ge=1, description="Requests that may share one batch")
    max_concurrent_requests: int = Field(
        256, ge=1, description="Requests above this get 429 with Retry-After"
    )
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
    truncation: Literal["disabled", "auto"] = Field(
        "disabled",
        description="Of conversations longer than the context: refuse them, or leave out the oldest turns (`auto`). "
        "Requests may say themselves: `truncation`",
    )
    stored_responses: int = Field(
        1000,
        ge=0,
        description="Responses of /v1/responses that are kept in memory for their clients, the latest of them; "
        "0: none is stored",
    )
    reconcile_seconds: float = Field(
        1.0, gt=0, description="How often the store is looked at for moved aliases"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="What the service logs"
    )

    @field_validator("max_lora_rank")
    @classmethod
    def _has_kernels(cls, value: int) -> int:
        if value not in LORA_RANKS:
            raise ValueError(f"must be one of {', '.join(map(str, LORA_RANKS))}")
        return value

    @field_validator("sources", "private_networks", mode="before")
    @classmethod
    def _split_at_spaces(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _residents_fill_the_slots(self) -> Self:
        if self.max_resident <= self.max_loras:
            raise ValueError(
                f"max_resident is {self.max_resident} and must be above max_loras, which is {self.max_loras}: "
                "what shares a batch is held, and one more is being loaded"
            )
        return self

    @field_validator("publish_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value

    @property
    def base_model(self) -> str:
        """The folder or Hugging Face id to load."""
        return self.model or str(self.data_dir / "models" / "xinglin-demo")

    @property
    def base_model_name(self) -> str:
        """The name of the base model on the wire: never a path."""
        return self.served_model_name or Path(self.base_model).name

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
