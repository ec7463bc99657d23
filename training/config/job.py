"""What jobs of several stages share."""

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
"""The kinds of canonical rows (training.data)."""


class Job(Settings):
    """What every stage shares. Facts about a stage that are no settings stand here too, and in its own class."""

    reads: ClassVar[Rows]
    """What its train_files hold."""
    in_one_process: ClassVar[bool] = False
    """Whether it cannot be launched as several processes."""

    stage: str
    name: Name
    """Name of what is made: an adapter, or a base model (stage scratch, and any stage with `merge: true`)."""
    train_files: Annotated[list[Source], Field(min_length=1)]
    """Data files, folders or globs; formats are recognised row by row (docs/data.md)."""
    on_error: OnError = OnError()
    """`stop`: report every bad row and train on none. `skip`: report them and train on the others."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in one step, on each device."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: the same config on the same machine makes the same tensors."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None leaves the choice to torch. Another number changes the last digits."""
    report_to: Trackers = Field(default=[])
    """Experiment trackers that get the numbers of a run beside TensorBoard: wandb, trackio, mlflow (docs/runs.md)."""

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a job of these settings, checked or not, makes a base model."""
        return False

    @property
    def makes_base(self) -> bool:
        """Whether the product is a base model in <data>/models/<name>, and not an adapter in the store."""
        return self.would_make_base(vars(self))

    @property
    def data(self) -> dict[str, list[Source]]:
        """All data files, by setting."""
        return {"train_files": self.train_files}

    def pinned(self, refs: Mapping[str, str]) -> Self:
        """The job with revisions in the place of its refs."""
        return self

    def settings(self) -> dict[str, Any]:
        """All settings as YAML has them, without those that nobody may give beside the others."""
        return self.model_dump(mode="json")


class AdapterJob(Job):
    """What every stage that makes an adapter shares."""

    in_pairs: ClassVar[bool] = False
    """Whether a row is two sequences, of which the second is learnt to be worse."""
    has_reference: ClassVar[bool] = False
    """Whether it scores its rows by a frozen reference model, too."""
    generates: ClassVar[bool] = False
    """Whether it learns from answers of its own."""

    base_model: BaseModelName
    """Folder of the base model, or its Hugging Face id. Served adapters need the same base."""
    chat_template: TemplateName | None = None
    """Prompt template by name (docs/templates.md), for a base that has none; it travels with the adapter. Left
    out: that of the adapter that training goes on with, or else the base's own."""
    control_tokens: Literal["text", "tokens"] = "text"
    """What a control token in the text of a message is, such as `<|im_start|>`: `text`, the letters it is written with,
    as the service takes it; or `tokens`, itself, for data that was rendered before."""
    evaluation_files: list[Source] = Field(default=[])
    """Data files for the measures before and after training; never trained on."""
    general_files: list[Source] = Field(default=[])
    """Data files of general ability, never trained on: the loss on them before and after training says what was
    forgotten."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the base model, which then can do whatever you can do."""
    lora: Lora = Lora()
    merge: bool = False
    """Make a new base model with the adapter merged into it, <data>/models/<name>, instead of an adapter."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Hold the frozen base model in fewer bits while training (NF4 with double quantisation, or LLM.int8): a
    quarter or half of the memory, and slower. What is made is for the plain base model."""
    rope_scaling: RopeScaling | None = None
    """Stretch the base model's context. The adapter is of use there only: it needs `merge: true`."""
    max_length: int = Field(default=1024, ge=16)
    """Longest row in tokens."""
    golden: Golden = Golden()
    publish: Publish = Publish()
    licence: str | None = None
    """Licence of the adapter, kept in its manifest."""
    notes: str | None = None
    """Anything a reader of the manifest should know."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, which a killed or stopped run is resumed from; None: four in a run."""

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training goes on with; None for a fresh one."""
        return None

    @property
    def rewards(self) -> Sequence[Reward]:
        """What answers are rewarded for."""
        return ()

    @property
    def longest_answer(self) -> int:
        """The most tokens that are generated behind a row."""
        return 0

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained, and there is no adapter."""
        return False

    @property
    def added_tokens(self) -> Sequence[str]:
        """Words that the tokenizer learns."""
        return ()

    @property
    def rows_learnt(self) -> int:
        """Sequences in one forward and backward pass."""
        return self.batch_size * (2 if self.in_pairs else 1)

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """With `merge: true`."""
        return settings.get("merge") is True

    @property
    def data(self) -> dict[str, list[Source]]:
        """All data files, by setting."""
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
                    f"{name} needs `merge: true`: the serving engine takes no adapter that brings it"
                )
        return self

    @model_validator(mode="after")
    def _nothing_of_an_adapter_for_a_base(self) -> Self:
        # Compared with the defaults, which a config that was dumped has in it.
        if self.makes_base and self.publish != Publish():
            raise ValueError(f"publish.alias has no effect: {_A_BASE}, which no alias can point at")
        if self.makes_base and self.golden != Golden():
            raise ValueError(f"golden has no effect: {_A_BASE}, which proves itself by no golden prompts")
        return self

    @model_validator(mode="after")
    def _data_names_differ(self) -> Self:
        sources = (source for sources in self.data.values() for source in sources)
        names = [file.name for source in sources for file in source.files]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"data files need different names, for the manifest: {', '.join(sorted(twice))}")
        return self

    @model_validator(mode="after")
    def _no_shape_for_what_has_one(self) -> Self:
        if self.starts_from and "lora" in self.model_fields_set:
            raise ValueError(f"lora has no effect: {self.starts_from} has a shape already")
        return self
