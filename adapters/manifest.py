"""The facts of one revision: from the trainer (Provenance) and from publishing (Manifest)."""

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
    """Change of the golden prompts' scores when computed in bfloat16: mean over all tokens, in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: float = Field(ge=0, description="Without the adapter")
    adapter: float = Field(ge=0, description="With the adapter")


class Provenance(BaseModel):
    """Facts that only the trainer knows. A run writes them beside the weights as provenance.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = Field(
        pattern=r"^[a-z0-9_-]{1,32}$", description="Training stage that made the adapter, or 'external'"
    )
    task: Task = "chat"
    base_model: str | None = Field(
        default=None,
        pattern=r"^[^/\\]{1,100}(/[^/\\]{1,100})?$",
        description="Name of the base model, never a host path",
    )
    base_fingerprint: str | None = None
    dtype: Dtype = Field(default="float32", description="dtype in which the golden prompts were computed")
    rounding: Rounding | None = Field(
        default=None,
        description="Change of the golden prompts' scores in bfloat16, measured by the trainer",
    )
    weights_digest: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of adapter_model.safetensors as training wrote it; a file with another one is refused",
    )
    stop: list[Stop] = Field(
        default=[],
        max_length=16,
        description="Texts that end an answer, for a chat template that has no token for it",
    )
    stop_token_ids: list[TokenId] = Field(
        default=[],
        max_length=64,
        description="Tokens that end an answer: the base model's own, and those of the chat template",
    )
    parent: str | None = Field(
        default=None, description="Ref of the adapter that training continued from; lineage only"
    )
    run_id: str | None = None
    data_digests: dict[str, str] = Field(default={}, description="File name to SHA-256 of the training data")
    changed_inputs: list[str] = Field(
        default=[], description="Inputs of the run that changed while it was interrupted, and were accepted"
    )
    metrics: dict[str, float] = {}
    licence: str | None = None
    notes: str | None = None


class Manifest(Provenance):
    """The facts of one revision. Written last: a folder with a manifest is a complete revision."""

    name: str
    revision: str = Field(
        description="First 12 hexadecimal digits of the digest of `files`, `stop` and `stop_token_ids`"
    )
    r: int
    lora_alpha: float
    target_modules: list[str]
    golden_prompts: int = Field(
        description="0: the adapter cannot be proved, and is served only where allowed"
    )
    files: dict[str, str] = Field(description="File name to SHA-256")
    created_at: datetime

    @property
    def ref(self) -> str:
        """`name@revision`, as used by clients, logs and engines."""
        return f"{self.name}@{self.revision}"

    @property
    def tensor_digest(self) -> str:
        """SHA-256 of adapter_model.safetensors."""
        return self.files["adapter_model.safetensors"]

    @property
    def chat_template_digest(self) -> str | None:
        """SHA-256 of the adapter's own chat template; None if it uses the base model's."""
        return self.files.get("chat_template.jinja")


def revision_of(files: Mapping[str, str], facts: Provenance) -> str:
    """Return the name of a revision: a digest of everything that affects its answers. `files`: name to SHA-256.

    Empty stops are left out, so that revisions published before these fields existed keep their names.
    """
    stops = {"stop": facts.stop, "stop_token_ids": facts.stop_token_ids}
    content = {**files, **{name: value for name, value in stops.items() if value}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
