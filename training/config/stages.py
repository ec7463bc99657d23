"""One class for each stage: what a job of that stage asks for."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from training.config.blocks import BaseModelSize, Lora, Reward
from training.config.fields import NewTokens, Ref, Url
from training.config.job import AdapterJob, Job, Rows


class ScratchConfig(Job):
    """Build a small base model from scratch: a tokenizer and a model, published as a model folder."""

    reads: ClassVar[Rows] = "documents"
    in_one_process: ClassVar[bool] = True

    stage: Literal["scratch"]
    model: BaseModelSize = BaseModelSize()
    steps: int = Field(ge=1)
    """Optimiser steps; each takes batch_size whole documents of about equal length."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak learning rate; high, as suits a model of a few million parameters."""

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """Always."""
        return True


class OfflineJob(AdapterJob):
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

    def settings(self) -> dict[str, Any]:
        """See Job."""
        found = super().settings()
        if self.max_steps is not None:
            found.pop("epochs")
        return found

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


class PtConfig(OfflineJob):
    """Continued pre-training: the base model reads on, in texts of your field."""

    reads: ClassVar[Rows] = "documents"

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

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """With `merge: true` or `full: true`."""
        return settings.get("merge") is True or settings.get("full") is True

    @property
    def is_full(self) -> bool:
        """With `full: true`."""
        return self.full

    @property
    def added_tokens(self) -> Sequence[str]:
        """See AdapterJob."""
        return self.new_tokens

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


class SftConfig(OfflineJob):
    """Supervised fine-tuning: an adapter that learns to answer as the training data's assistant does."""

    reads: ClassVar[Rows] = "chats"

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

    def pinned(self, refs: Mapping[str, str]) -> Self:
        """See Job."""
        return self.model_copy(update={"adapter": refs[self.adapter]}) if self.adapter else self


class RmConfig(OfflineJob):
    """Reward modelling: an adapter with a score head that ranks chosen answers above rejected ones."""

    reads: ClassVar[Rows] = "preferences"
    in_pairs: ClassVar[bool] = True

    stage: Literal["rm"]
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training data; reward models overfit after one or two."""
    center_rewards: float = Field(default=0.01, ge=0)
    """Weight of a term that keeps rewards around zero (Eisenstein et al. 2023, arXiv:2312.09244)."""

    def settings(self) -> dict[str, Any]:
        """See Job."""
        found = super().settings()
        found.pop("golden")
        return found

    @model_validator(mode="after")
    def _answers_nothing(self) -> Self:
        if "golden" in self.model_fields_set:
            raise ValueError("golden has no effect: a reward adapter answers nothing")
        if self.general_files:
            raise ValueError("general_files have no effect: a reward adapter answers nothing")
        if self.merge:
            raise ValueError(
                "merge: a reward adapter is not merged: stages ppo and grpo put it on their base"
            )
        return self


class _PreferenceJob(OfflineJob):
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

    def pinned(self, refs: Mapping[str, str]) -> Self:
        """See Job."""
        return self.model_copy(update={"policy": refs[self.policy]}) if self.policy else self


class DpoConfig(_PreferenceJob):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290)."""

    reads: ClassVar[Rows] = "preferences"
    in_pairs: ClassVar[bool] = True
    has_reference: ClassVar[bool] = True

    stage: Literal["dpo"]


class KtoConfig(_PreferenceJob):
    """Kahneman-Tversky optimisation: answers that are good or bad by themselves (arXiv:2402.01306)."""

    reads: ClassVar[Rows] = "feedback"
    has_reference: ClassVar[bool] = True

    stage: Literal["kto"]


class OrpoConfig(_PreferenceJob):
    """Odds-ratio preference optimisation, which needs no reference (Hong et al. 2024, arXiv:2403.07691)."""

    reads: ClassVar[Rows] = "preferences"
    in_pairs: ClassVar[bool] = True

    stage: Literal["orpo"]


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


class OnlineJob(AdapterJob):
    """Stages that learn from answers of their own, as rewards mark them."""

    reads: ClassVar[Rows] = "prompts"
    has_reference: ClassVar[bool] = True
    generates: ClassVar[bool] = True

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

    @property
    def rewards(self) -> Sequence[Reward]:
        """See AdapterJob."""
        return self.reward

    @property
    def longest_answer(self) -> int:
        """See AdapterJob."""
        return self.max_new_tokens

    def pinned(self, refs: Mapping[str, str]) -> Self:
        """See Job."""
        rewards = [
            reward.model_copy(update={"adapter": refs[reward.adapter]}) if reward.adapter else reward
            for reward in self.reward
        ]
        return self.model_copy(update={"policy": refs[self.policy], "reward": rewards})


class PpoConfig(OnlineJob):
    """Proximal policy optimisation against a reward model (Schulman et al. 2017, arXiv:1707.06347)."""

    in_one_process: ClassVar[bool] = True

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
    rollout_service: Url | None = None
    """A running Xinglin service of the same base model that samples the answers, such as http://127.0.0.1:8000: of
    use where the base model is large. Its admin key is read from XINGLIN_ADMIN_KEY. None: sampled here."""
    min_reward_accuracy: float = Field(default=0.6, ge=0, le=1)
    """A reward adapter whose held-out pair accuracy was below this is refused: it would teach noise."""

    @property
    def rows_learnt(self) -> int:
        """See AdapterJob."""
        return self.minibatch_size

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


class GrpoConfig(OnlineJob):
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
    ScratchConfig
    | PtConfig
    | SftConfig
    | RmConfig
    | PpoConfig
    | DpoConfig
    | KtoConfig
    | OrpoConfig
    | GrpoConfig
)
