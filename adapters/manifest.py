"""The facts of one revision: what the trainer knew (Provenance) and what publishing found (Manifest)."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PROVENANCE_FILE = "provenance.json"
MANIFEST_FILE = "manifest.json"

Task = Literal["chat", "reward"]
Dtype = Literal["float32", "bfloat16", "float16"]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class Rounding(BaseModel):
    """How far the scores of golden prompts move when they are computed in bfloat16: nats, the mean over all tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: float = Field(ge=0, description="Of the base model alone")
    adapter: float = Field(ge=0, description="Of base and adapter")


class Provenance(BaseModel):
    """What only the trainer knows. A run writes it beside the weights as provenance.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = Field(
        pattern=r"^[a-z0-9_-]{1,32}$", description="The training stage that made it, or 'external'"
    )
    task: Task = "chat"
    base_model: str | None = Field(
        default=None,
        pattern=r"^[^/\\]{1,100}(/[^/\\]{1,100})?$",
        description="Name of the base model, never a path of the host",
    )
    base_fingerprint: str | None = None
    dtype: Dtype = Field(default="float32", description="What the golden prompts were computed in")
    rounding: Rounding | None = Field(
        default=None,
        description="What bfloat16 makes of the scores of the golden prompts, measured by the trainer",
    )
    weights_digest: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of adapter_model.safetensors as training wrote it; others are refused",
    )
    stop: list[Stop] = Field(
        default=[],
        max_length=16,
        description="Texts of its chat template that end an answer, where no token of their own does",
    )
    stop_token_ids: list[TokenId] = Field(
        default=[],
        max_length=64,
        description="Tokens that end an answer: the base model's own, and those its chat template ends one with",
    )
    parent: str | None = Field(
        default=None, description="Ref of the adapter it was continued from: lineage only"
    )
    run_id: str | None = None
    data_digests: dict[str, str] = Field(default={}, description="File name to SHA-256 of the training data")
    changed_inputs: list[str] = Field(
        default=[], description="What of a run's inputs changed while it was interrupted, and was accepted"
    )
    metrics: dict[str, float] = {}
    licence: str | None = None
    notes: str | None = None


class Manifest(Provenance):
    """The facts of one revision, written last: where there is a manifest there is a whole revision."""

    name: str
    revision: str = Field(
        description="First 12 hexadecimal digits of the digest of `files` and of both stops"
    )
    r: int
    lora_alpha: float
    target_modules: list[str]
    golden_prompts: int = Field(description="0: nothing to prove it by; it is served only where allowed")
    files: dict[str, str] = Field(description="File name to SHA-256")
    created_at: datetime

    @property
    def ref(self) -> str:
        """`name@revision`, by which clients, logs and engines name it."""
        return f"{self.name}@{self.revision}"

    @property
    def tensor_digest(self) -> str:
        """SHA-256 of adapter_model.safetensors."""
        return self.files["adapter_model.safetensors"]

    @property
    def chat_template_digest(self) -> str | None:
        """SHA-256 of the adapter's own chat template; None when it uses the base model's."""
        return self.files.get("chat_template.jinja")


def revision_of(files: Mapping[str, str], facts: Provenance) -> str:
    """The name of a revision: a digest of all that makes an answer what it is. `files`: name to SHA-256.

    What is empty is left out, so that a revision from before a field existed keeps its name.
    """
    stops = {"stop": facts.stop, "stop_token_ids": facts.stop_token_ids}
    content = {**files, **{name: value for name, value in stops.items() if value}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
