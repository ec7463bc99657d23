"""One class for each stage: what a job of that stage asks for."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from training.config.blocks import BaseModelSize, Golden, Lora, Publish, Reward, RopeScaling
from training.config.fields import (
    BaseModelName,
    Name,
    NewTokens,
    OnError,
    Ref,
    Settings,
    Source,
    TemplateName,
)

_A_BASE = "this job makes a base model"


class _Job(Settings):
    name: Name
    """Name of what is made: an adapter, or a base model (stage base, and any stage with `merge: true`)."""
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

    @property
    def makes_base(self) -> bool:
        """Whether the product is a base model in <data>/models/<name>, and not an adapter in the store."""
        return False


class BaseConfig(_Job):
    """Build a small base model from scratch: a tokenizer and a model, published as a model folder."""

    stage: Literal["base"]
    model: BaseModelSize = BaseModelSize()
    steps: int = Field(ge=1)
    """Optimiser steps; each takes batch_size whole documents of about equal length."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak learning rate; high, as suits a model of a few million parameters."""

    @property
    def makes_base(self) -> bool:
        """Always."""
        return True


class AdapterJob(_Job):
    """What every stage that makes an adapter shares."""

    base_model: BaseModelName
    """Folder of the base model, or its Hugging Face id. Served adapters need the same base."""
    chat_template: TemplateName | None = None
    """Prompt template by name (docs/templates.md), for a base that has none; it travels with the adapter. Left
    out: that of the adapter that training goes on with, or else the base's own."""
    evaluation_files: list[Source] = Field(default=[])
    """Data files for the measures before and after training; never trained on."""
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
    def makes_base(self) -> bool:
        """With `merge: true`."""
        return self.merge

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
        names = [file.name for source in (*self.train_files, *self.evaluation_files) for file in source.files]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"data files need different names, for the manifest: {', '.join(sorted(twice))}")
        return self

    @model_validator(mode="after")
    def _no_shape_for_what_has_one(self) -> Self:
        if self.starts_from and "lora" in self.model_fields_set:
            raise ValueError(f"lora has no effect: {self.starts_from} has a shape already")
        return self


class _OfflineJob(AdapterJob):
    """Stages that pass over rows, rather than generate their own."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps, instead of epochs."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations while training; None: only before and after."""
    early_stop: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better loss, and keep the best adapter."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches in one optimiser step: as good as batch_size times so many rows, in the memory of one batch."""
    gradient_checkpointing: bool | None = None
    """Compute activations twice instead of keeping them: much less memory, a third slower. None: on a GPU."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if {"epochs", "max_steps"} <= self.model_fields_set and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both")
        if self.evaluate_every is not None and not self.evaluation_files:
            raise ValueError("evaluate_every has no effect without evaluation_files")
        if self.early_stop is not None and self.evaluate_every is None:
            raise ValueError("early_stop needs evaluate_every")
        if self.early_stop is not None and self.checkpoint_every is not None:
            raise ValueError(
                "checkpoint_every has no effect with early_stop: checkpoints are where evaluations are"
            )
        return self


class PtConfig(_OfflineJob):
    """Continued pre-training: the base model reads on, in texts of your field."""

    stage: Literal["pt"]
    full: bool = False
    """Train all weights, and make a new base model, <data>/models/<name>; there is no adapter then."""
    new_tokens: NewTokens = ()
    """Words that the tokenizer is to learn as one token each: a list, or a text file of one word a line. Needs
    `merge: true` or `full: true`."""
    packing: bool | None = None
    """Fill rows of max_length with several documents each, which do not see one another. None: wherever the base
    model's architecture can keep them apart."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training data."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; with `full: true`, 1e-5 suits models of billions of parameters."""

    @property
    def makes_base(self) -> bool:
        """With `merge: true` or `full: true`."""
        return self.merge or self.full

    @model_validator(mode="after")
    def _no_adapter_in_full(self) -> Self:
        if self.full:
            for name, asked in (
                ("lora", self.lora != Lora()),
                ("merge", self.merge),
                ("quantization", self.quantization),
            ):
                if asked:
                    raise ValueError(f"{name} has no effect with `full: true`, which trains all weights")
        return self

    @model_validator(mode="after")
    def _new_tokens_need_a_base(self) -> Self:
        if self.new_tokens and not self.makes_base:
            raise ValueError(
                "new_tokens needs `merge: true` or `full: true`: the serving engine takes no adapter that brings "
                "tokens and embeddings of its own"
            )
        return self


class SftConfig(_OfflineJob):
    """Supervised fine-tuning: an adapter that learns to answer as the training data's assistant does."""

    stage: Literal["sft"]
    adapter: Ref | None = None
    """Adapter to go on with, such as one of stage pt; left out, a fresh one."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate; 1e-4 to 3e-4 suits models of billions of parameters."""
    packing: bool = False
    """Fill rows of max_length with several conversations each, which do not see one another, instead of batches
    of about equal length; batch_size then counts full rows. A gain on a GPU, where short batches waste it."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings while training, which makes small data go further (arXiv:2310.05914); 5 is usual."""

    @model_validator(mode="after")
    def _noise_by_length(self) -> Self:
        if self.packing and self.neftune_noise_alpha:
            raise ValueError(
                "neftune_noise_alpha goes by the length of a row, which packing changes: give one of them"
            )
        return self

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training goes on with; None for a fresh one."""
        return self.adapter


class RmConfig(_OfflineJob):
    """Reward modelling: an adapter with a score head that ranks chosen answers above rejected ones."""

    stage: Literal["rm"]
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training data; reward models overfit after one or two."""
    center_rewards: float = Field(default=0.01, ge=0)
    """Weight of a term that keeps rewards around zero (Eisenstein et al. 2023, arXiv:2312.09244)."""

    @model_validator(mode="after")
    def _no_golden(self) -> Self:
        if "golden" in self.model_fields_set:
            raise ValueError("golden has no effect: a reward adapter answers nothing")
        if self.merge:
            raise ValueError(
                "merge: a reward adapter is not merged: stages ppo and grpo put it on their base"
            )
        return self


class _PreferenceJob(_OfflineJob):
    policy: Ref | None = None
    """Adapter to improve, such as one of stage sft; a frozen copy of it is the reference. Left out, a fresh
    adapter, whose reference is the base model."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training data."""
    beta: float = Field(default=0.1, gt=0)
    """How much straying from the reference costs; for orpo, the weight of the odds ratio."""

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training goes on with; None for a fresh one."""
        return self.policy


class DpoConfig(_PreferenceJob):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290)."""

    stage: Literal["dpo"]


class KtoConfig(_PreferenceJob):
    """Kahneman-Tversky optimisation: answers that are good or bad by themselves (arXiv:2402.01306)."""

    stage: Literal["kto"]


class OrpoConfig(_PreferenceJob):
    """Odds-ratio preference optimisation, which needs no reference (Hong et al. 2024, arXiv:2403.07691)."""

    stage: Literal["orpo"]


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


class _OnlineJob(AdapterJob):
    """Stages that learn from answers of their own, as rewards mark them."""

    policy: Ref
    """Adapter to improve, such as one of stage sft; a frozen copy of it is the reference."""
    reward: Annotated[list[Reward], BeforeValidator(_as_list), Field(min_length=1)]
    """What answers are rewarded for: the ref of a reward adapter, or a weighted list (see docs)."""
    steps: int = Field(ge=1)
    """Rounds of generating answers and learning from them."""
    max_length: int = Field(default=1024, ge=16)
    """Longest prompt, in tokens; rows with a longer one are left out."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer, in tokens."""
    no_stop_penalty: float = Field(default=1.0, ge=0)
    """Taken off the reward of an answer that max_new_tokens cut."""

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training goes on with."""
        return self.policy


class PpoConfig(_OnlineJob):
    """Proximal policy optimisation against a reward model (Schulman et al. 2017, arXiv:1707.06347)."""

    stage: Literal["ppo"]
    batch_size: int = Field(default=32, ge=1)
    """Prompts answered in one step."""
    minibatch_size: int = Field(default=16, ge=1)
    """Answers in one optimiser step; divides batch_size."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the answers of one step."""
    learning_rate: float = Field(default=3e-5, gt=0)
    """Of the policy; constant."""
    value_learning_rate: float = Field(default=3e-3, gt=0)
    """Of the value head; constant."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """How far the probability of a token may move in one step, as a ratio."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Bias against variance of the advantages (arXiv:1506.02438); nothing is discounted."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    kl_coefficient: float = Field(default=0.2, ge=0)
    """What a nat of straying from the reference costs, to begin with."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats an answer that the coefficient is steered towards (arXiv:1909.08593); None keeps it constant."""
    min_reward_accuracy: float = Field(default=0.6, ge=0, le=1)
    """A reward adapter whose held-out pair accuracy was below this is refused: it would teach noise."""

    @model_validator(mode="after")
    def _minibatches_fit(self) -> Self:
        if self.batch_size % self.minibatch_size:
            raise ValueError("minibatch_size must divide batch_size")
        return self

    @model_validator(mode="after")
    def _something_to_steer(self) -> Self:
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target has no effect with kl_coefficient 0, which stays 0")
        return self


class GrpoConfig(_OnlineJob):
    """Group-relative policy optimisation (arXiv:2402.03300), or RLOO (arXiv:2402.14740): no value head."""

    stage: Literal["grpo"]
    algorithm: Literal["grpo", "rloo"] = "grpo"
    """How answers to one prompt are compared: with the mean of the group, or with the mean of the others."""
    generations: int = Field(default=4, ge=2)
    """Answers to one prompt; divides batch_size."""
    batch_size: int = Field(default=32, ge=2)
    """Answers in one step."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    gradient_checkpointing: bool | None = None
    """Compute activations twice instead of keeping them: much less memory, a third slower. None: on a GPU."""
    beta: float = Field(default=0.05, ge=0)
    """What a nat of straying from the reference costs."""

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.batch_size % self.generations:
            raise ValueError("generations must divide batch_size")
        return self

    @model_validator(mode="after")
    def _measured_on_the_way(self) -> Self:
        if self.evaluation_files:
            raise ValueError("evaluation_files have no effect: reward and straying are measured in training")
        return self


JobConfig = (
    BaseConfig | PtConfig | SftConfig | RmConfig | PpoConfig | DpoConfig | KtoConfig | OrpoConfig | GrpoConfig
)
