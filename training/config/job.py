"""Settings that jobs of several stages share."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from training.config.blocks import Golden, Lora, Publish, Reward, RopeScaling
from training.config.fields import (
    BaseModelName,
    Name,
    OnError,
    Settings,
    Source,
    TemplateName,
    Trackers,
)

_A_BASE = "this job makes a base model"


Rows = Literal["documents", "chats", "preferences", "feedback", "prompts"]
"""Kinds of canonical rows (see training.data)."""


class Job(Settings):
    """Settings of every stage. Class variables hold facts about a stage that are not settings."""

    reads: ClassVar[Rows]
    """Kind of rows in train_files."""
    in_one_process: ClassVar[bool] = False
    """Whether the stage trains in a single process only."""

    stage: str
    name: Name
    """Name of the adapter, or of the base model (stage scratch, `merge: true` and `full: true`), that the job makes."""
    train_files: Annotated[list[Source], Field(min_length=1)]
    """Data files, folders or globs. The format of each row is detected (docs/en/data.md)."""
    on_error: OnError = OnError()
    """`stop` (default): report all bad rows and do not train. `skip`: report them and train on the other rows."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per step, on each device."""
    seed: int = Field(default=0, ge=0)
    """Random seed. The same config on the same machine gives the same tensors."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; the number affects the last digits of results. Default: torch decides."""
    report_to: Trackers = Field(default=[])
    """Experiment trackers that get the metrics in addition to TensorBoard: wandb, trackio, mlflow (docs/en/runs.md)."""

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a job with these settings, validated or not, makes a base model."""
        return False

    @property
    def makes_base(self) -> bool:
        """Whether the job makes a base model in <data>/models/<name> instead of an adapter in the store."""
        return self.would_make_base(vars(self))

    @property
    def data(self) -> dict[str, list[Source]]:
        """Data sources by setting."""
        return {"train_files": self.train_files}

    def pinned(self, refs: Mapping[str, str]) -> Self:
        """Return the job with each ref replaced by its revision."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return all settings as in YAML, without those that the other settings rule out."""
        return self.model_dump(mode="json")


class AdapterJob(Job):
    """Settings of every stage that makes an adapter."""

    in_pairs: ClassVar[bool] = False
    """Whether a row is a pair of sequences, chosen and rejected."""
    has_reference: ClassVar[bool] = False
    """Whether the stage also scores its rows with a frozen reference model."""
    generates: ClassVar[bool] = False
    """Whether the stage generates the answers that it learns from."""

    base_model: BaseModelName
    """Folder or Hugging Face id of the base model. The service must run the same base to serve the adapter."""
    chat_template: TemplateName | None = None
    """Name of a prompt template (docs/en/templates.md), for a base without one; published with the adapter. Default:
    the template of the adapter that training continues from, or else the base's own."""
    control_tokens: Literal["text", "tokens"] = "text"
    """How control tokens in message text, such as `<|im_start|>`, are tokenized. `text`: as ordinary text, as the
    service does. `tokens`: as control tokens, for data that is rendered already. Default: `text`."""
    evaluation_files: list[Source] = Field(default=[])
    """Data files to evaluate on before and after training; never trained on."""
    general_files: list[Source] = Field(default=[])
    """Data files of general ability, never trained on. The loss on them before and after training measures
    forgetting."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the base model, with your permissions."""
    lora: Lora = Lora()
    merge: bool = False
    """Merge the adapter into a new base model, <data>/models/<name>, instead of publishing it."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Quantize the frozen base model during training (4bit: NF4 with double quantization; 8bit: LLM.int8): a quarter
    or half of the memory, but slower. The result is for the unquantized base model."""
    rope_scaling: RopeScaling | None = None
    """Extend the base model's context. Needs `merge: true`: the adapter works only with the extended context."""
    max_length: int = Field(default=1024, ge=16)
    """Maximum length of a row, in tokens."""
    golden: Golden = Golden()
    publish: Publish = Publish()
    licence: str | None = None
    """Licence of the adapter, for its manifest."""
    notes: str | None = None
    """Notes for readers of the manifest."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, from which killed or stopped runs resume. Default: four checkpoints per run."""

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training continues from; None for a new adapter."""
        return None

    @property
    def rewards(self) -> Sequence[Reward]:
        """Rewards of the answers."""
        return ()

    @property
    def longest_answer(self) -> int:
        """Maximum number of tokens generated per row."""
        return 0

    @property
    def is_full(self) -> bool:
        """Whether the job trains all weights instead of an adapter."""
        return False

    @property
    def added_tokens(self) -> Sequence[str]:
        """Words that the job adds to the tokenizer."""
        return ()

    @property
    def rows_learnt(self) -> int:
        """Sequences in one forward and backward pass."""
        return self.batch_size * (2 if self.in_pairs else 1)

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """See Job. True with `merge: true`."""
        return settings.get("merge") is True

    @property
    def data(self) -> dict[str, list[Source]]:
        """Data sources by setting."""
        return {
            "train_files": self.train_files,
            "evaluation_files": self.evaluation_files,
            "general_files": self.general_files,
        }

    def settings(self) -> dict[str, Any]:
        """See Job."""
        found = super().settings()
        if self.starts_from:
            found.pop("lora")
        return found

    @model_validator(mode="after")
    def _can_be_served(self) -> Self:
        if self.makes_base:
            return self
        for name, asked in (
            ("lora.use_dora", self.lora.use_dora),
            ("lora.modules_to_save", self.lora.modules_to_save),
            ("rope_scaling", self.rope_scaling),
        ):
            if asked:
                raise ValueError(
                    f"{name} needs `merge: true`: the serving engine cannot load it in an adapter"
                )
        return self

    @model_validator(mode="after")
    def _nothing_of_an_adapter_for_a_base(self) -> Self:
        # Compare with the defaults: a dumped config spells them out.
        if self.makes_base and self.publish != Publish():
            raise ValueError(f"publish.alias has no effect: {_A_BASE}, and aliases point only at adapters")
        if self.makes_base and self.golden != Golden():
            raise ValueError(f"golden has no effect: {_A_BASE}, and only adapters have golden prompts")
        return self

    @model_validator(mode="after")
    def _data_names_differ(self) -> Self:
        sources = (source for sources in self.data.values() for source in sources)
        names = [file.name for source in sources for file in source.files]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"data files need distinct names for the manifest: {', '.join(sorted(twice))}")
        return self

    @model_validator(mode="after")
    def _no_shape_for_what_has_one(self) -> Self:
        if self.starts_from and "lora" in self.model_fields_set:
            raise ValueError(
                f"lora has no effect: training continues from {self.starts_from} and keeps its shape"
            )
        return self
