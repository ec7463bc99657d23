"""One config class per stage."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from training.config.blocks import BaseModelSize, Lora, Reward
from training.config.fields import NewTokens, Ref, Url
from training.config.job import AdapterJob, Job, Rows


class ScratchConfig(Job):
    """Train a small base model from scratch: a tokenizer and a model, published as a model folder."""

    reads: ClassVar[Rows] = "documents"
    in_one_process: ClassVar[bool] = True

    stage: Literal["scratch"]
    model: BaseModelSize = BaseModelSize()
    steps: int = Field(ge=1)
    """Optimizer steps; each uses batch_size whole documents of similar length."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Peak learning rate. The default is high, for a model of a few million parameters."""

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """See Job. Always true."""
        return True


class OfflineJob(AdapterJob):
    """Settings of stages that train on given rows rather than on generated answers."""

    epochs: float = Field(default=3, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps, instead of epochs."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations during training. Default: evaluate only before and after."""
    early_stop: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations in a row without a better loss, and keep the best adapter. Default: off."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches per optimizer step: the effect of a larger batch_size in the memory of one batch."""
    gradient_checkpointing: bool | None = None
    """Recompute activations instead of storing them: much less memory, a third slower. Default: on with a GPU."""

    def settings(self) -> dict[str, Any]:
        """See Job."""
        found = super().settings()
        if self.max_steps is not None:
            found.pop("epochs")
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if {"epochs", "max_steps"} <= self.model_fields_set and self.max_steps is not None:
            raise ValueError("set epochs or max_steps, not both")
        if self.evaluate_every is not None and not self.evaluation_files:
            raise ValueError("evaluate_every has no effect without evaluation_files")
        if self.early_stop is not None and self.evaluate_every is None:
            raise ValueError("early_stop needs evaluate_every")
        if self.early_stop is not None and self.checkpoint_every is not None:
            raise ValueError(
                "checkpoint_every has no effect with early_stop: every evaluation writes a checkpoint"
            )
        return self


class PtConfig(OfflineJob):
    """Continued pre-training of a base model on texts of your field."""

    reads: ClassVar[Rows] = "documents"

    stage: Literal["pt"]
    full: bool = False
    """Train all weights into a new base model, <data>/models/<name>, instead of an adapter."""
    new_tokens: NewTokens = ()
    """Words to add to the tokenizer as one token each: a list, or a text file with one word per line. Needs
    `merge: true` or `full: true`."""
    packing: bool | None = None
    """Pack several documents into each row of max_length; documents do not attend to one another. Default: pack if
    the base model's architecture can keep them apart."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training data."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; with `full: true`, 1e-5 suits models with billions of parameters."""

    @classmethod
    def would_make_base(cls, settings: Mapping[str, Any]) -> bool:
        """See Job. True with `merge: true` or `full: true`."""
        return settings.get("merge") is True or settings.get("full") is True

    @property
    def is_full(self) -> bool:
        """See AdapterJob. True with `full: true`."""
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
                "new_tokens needs `merge: true` or `full: true`: the serving engine cannot load tokens and embeddings "
                "in an adapter"
            )
        return self


class SftConfig(OfflineJob):
    """Supervised fine-tuning on the assistant's answers in the training data."""

    reads: ClassVar[Rows] = "chats"

    stage: Literal["sft"]
    adapter: Ref | None = None
    """Adapter that training continues from, such as one of stage pt. Default: a new adapter."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate; 1e-4 to 3e-4 suits models with billions of parameters."""
    packing: bool = False
    """Pack several conversations into each row of max_length, instead of batching rows of similar length; conversations
    do not attend to one another, and batch_size counts packed rows. Faster on a GPU with short conversations."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings during training, which helps with small data (arXiv:2310.05914); 5 is usual. Default:
    off."""

    @model_validator(mode="after")
    def _noise_by_length(self) -> Self:
        if self.packing and self.neftune_noise_alpha:
            raise ValueError(
                "neftune_noise_alpha depends on the length of a row, which packing changes: set only one of them"
            )
        return self

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training continues from; None for a new adapter."""
        return self.adapter

    def pinned(self, refs: Mapping[str, str]) -> Self:
        """See Job."""
        return self.model_copy(update={"adapter": refs[self.adapter]}) if self.adapter else self


class RmConfig(OfflineJob):
    """Reward modeling: an adapter with a score head that ranks chosen answers above rejected ones."""

    reads: ClassVar[Rows] = "preferences"
    in_pairs: ClassVar[bool] = True

    stage: Literal["rm"]
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training data; reward models overfit after one or two passes."""
    center_rewards: float = Field(default=0.01, ge=0)
    """Weight of the loss term that keeps rewards around zero (Eisenstein et al. 2023, arXiv:2312.09244)."""

    def settings(self) -> dict[str, Any]:
        """See Job."""
        found = super().settings()
        found.pop("golden")
        return found

    @model_validator(mode="after")
    def _answers_nothing(self) -> Self:
        if "golden" in self.model_fields_set:
            raise ValueError("golden has no effect: a reward adapter does not generate answers")
        if self.general_files:
            raise ValueError("general_files have no effect: a reward adapter does not generate answers")
        if self.merge:
            raise ValueError(
                "merge: a reward adapter cannot be merged; stages ppo and grpo load it on their base model"
            )
        return self


class _PreferenceJob(OfflineJob):
    policy: Ref | None = None
    """Adapter to improve, such as one of stage sft; a frozen copy of it is the reference. Default: a new adapter, with
    the base model as the reference."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training data."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the KL constraint to the reference; for orpo, weight of the odds-ratio loss."""

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training continues from; None for a new adapter."""
        return self.policy

    def pinned(self, refs: Mapping[str, str]) -> Self:
        """See Job."""
        return self.model_copy(update={"policy": refs[self.policy]}) if self.policy else self


class DpoConfig(_PreferenceJob):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    reads: ClassVar[Rows] = "preferences"
    in_pairs: ClassVar[bool] = True
    has_reference: ClassVar[bool] = True

    stage: Literal["dpo"]


class KtoConfig(_PreferenceJob):
    """Kahneman-Tversky optimization on single answers labeled good or bad (arXiv:2402.01306)."""

    reads: ClassVar[Rows] = "feedback"
    has_reference: ClassVar[bool] = True

    stage: Literal["kto"]


class OrpoConfig(_PreferenceJob):
    """Odds-ratio preference optimization, without a reference model (Hong et al. 2024, arXiv:2403.07691)."""

    reads: ClassVar[Rows] = "preferences"
    in_pairs: ClassVar[bool] = True

    stage: Literal["orpo"]


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


class OnlineJob(AdapterJob):
    """Settings of stages that learn from rewards of the answers they generate."""

    reads: ClassVar[Rows] = "prompts"
    has_reference: ClassVar[bool] = True
    generates: ClassVar[bool] = True

    policy: Ref
    """Adapter to improve, such as one of stage sft. A frozen copy of it is the reference."""
    reward: Annotated[list[Reward], BeforeValidator(_as_list), Field(min_length=1)]
    """Rewards of the answers: the ref of a reward adapter, or a weighted list (docs/en/rewards.md)."""
    steps: int = Field(ge=1)
    """Number of rounds; each generates answers and learns from them."""
    max_length: int = Field(default=1024, ge=16)
    """Maximum length of a prompt, in tokens; rows with longer prompts are skipped."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Maximum length of an answer, in tokens."""
    no_stop_penalty: float = Field(default=1.0, ge=0)
    """Penalty subtracted from the reward of an answer that max_new_tokens cuts off."""

    @property
    def starts_from(self) -> str | None:
        """Ref of the adapter that training continues from."""
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
    """Proximal policy optimization against rewards (Schulman et al. 2017, arXiv:1707.06347)."""

    in_one_process: ClassVar[bool] = True

    stage: Literal["ppo"]
    batch_size: int = Field(default=32, ge=1)
    """Prompts answered per step."""
    minibatch_size: int = Field(default=16, ge=1)
    """Answers per optimizer step; must divide batch_size."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the answers of each step."""
    learning_rate: float = Field(default=3e-5, gt=0)
    """Learning rate of the policy; constant."""
    value_learning_rate: float = Field(default=3e-3, gt=0)
    """Learning rate of the value head; constant."""
    clip: float = Field(default=0.2, gt=0, lt=1)
    """Clip range of the probability ratio of a token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Trade-off between bias and variance of the advantages (GAE, arXiv:1506.02438). The discount factor is 1."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    kl_coefficient: float = Field(default=0.2, ge=0)
    """Initial KL coefficient: reward subtracted per nat of KL to the reference."""
    kl_target: float | None = Field(default=None, gt=0)
    """Target KL, in nats per answer, for adapting kl_coefficient (arXiv:1909.08593). Default: keep it constant."""
    rollout_service: Url | None = None
    """URL of a running Xinglin service with the same base model that samples the answers, such as
    http://127.0.0.1:8000; useful for large base models. XINGLIN_ADMIN_KEY holds its admin key. Default: sample in the
    training process."""
    min_reward_accuracy: float = Field(default=0.6, ge=0, le=1)
    """Minimum held-out pair accuracy of a reward adapter; one below this is refused, as it would teach noise."""

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
    """Group-relative policy optimization (arXiv:2402.03300) or RLOO (arXiv:2402.14740); neither needs a value head."""

    stage: Literal["grpo"]
    algorithm: Literal["grpo", "rloo"] = "grpo"
    """Baseline of an answer's reward: the mean of its group (`grpo`), or the mean of the other answers (`rloo`)."""
    generations: int = Field(default=4, ge=2)
    """Answers per prompt; must divide batch_size."""
    batch_size: int = Field(default=32, ge=2)
    """Answers per step, on each device."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    gradient_checkpointing: bool | None = None
    """Recompute activations instead of storing them: much less memory, a third slower. Default: on with a GPU."""
    beta: float = Field(default=0.05, ge=0)
    """KL coefficient."""

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.batch_size % self.generations:
            raise ValueError("generations must divide batch_size")
        return self

    @model_validator(mode="after")
    def _measured_on_the_way(self) -> Self:
        if self.evaluation_files:
            raise ValueError("evaluation_files have no effect: reward and KL are measured during training")
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
