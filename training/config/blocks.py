"""Blocks that several stages share."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from training.config.fields import Alias, BaseModelName, Ref, Settings, Url

# What vLLM's attention takes on CPU: with another size the engine starts, and dies of its first request.
_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class BaseModelSize(Settings):
    """Size of a model built from scratch, in the words of transformers.Qwen3Config."""

    vocab_size: int = Field(default=2048, ge=300, multiple_of=64)
    """Tokens of the byte-level BPE tokenizer trained on the data."""
    hidden_size: int = Field(default=192, ge=32)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=512, ge=32)
    """Width of the feed-forward layers."""
    num_hidden_layers: int = Field(default=3, ge=1)
    """Layers."""
    num_attention_heads: int = Field(default=3, ge=1)
    """Query heads."""
    num_key_value_heads: int = Field(default=1, ge=1)
    """Key and value heads; divides num_attention_heads."""
    head_dim: int = 64
    """Size of one head; only those that the serving engine's attention takes on CPU."""
    max_position_embeddings: int = Field(default=1024, ge=64)
    """Longest context, in tokens."""
    initializer_range: float = Field(default=0.06, gt=0)
    """Standard deviation of the initial weights; small models want more than the usual 0.02."""

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if self.head_dim not in _HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {', '.join(map(str, _HEAD_DIMS))}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        return self


class Lora(Settings):
    """The adapter's shape, in PEFT's own words."""

    r: int = Field(default=16, ge=1, le=512)
    """Rank. The serving engine must be started with at least this max_lora_rank."""
    lora_alpha: float = Field(default=32, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get an adapter: all but lm_head, whatever the architecture calls them, or a list
    such as [q_proj, v_proj]."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, which keeps high ranks stable."""
    use_dora: bool = False
    """Learn length and direction of each weight apart (arXiv:2402.09353). No engine serves such an adapter: it
    needs `merge: true`."""
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None = None
    """Modules that are trained whole, such as [embed_tokens, lm_head]. No engine serves such an adapter: it needs
    `merge: true`."""


class RopeScaling(Settings):
    """A context longer than the base model's own, by stretching its rotary positions."""

    type: Literal["linear", "dynamic", "yarn"]
    """`linear` (arXiv:2306.15595), `dynamic` (NTK-aware, grows with the text) or `yarn` (arXiv:2309.00071)."""
    factor: float = Field(gt=1)
    """How many times longer."""


class Golden(Settings):
    """The golden prompts, by which a serving engine proves that it answers as the trainer did."""

    prompts: int = Field(default=12, ge=8, le=20)
    """How many, taken evenly from the evaluation rows, or from the training rows if there are none."""
    max_new_tokens: int = Field(default=64, ge=1, le=1024)
    """Longest greedy answer."""


class Publish(Settings):
    """What happens in the adapter store when the run succeeds."""

    alias: Alias | None = None
    """Alias to point at the new revision; a server that follows this alias loads, proves and serves it.
    None publishes the revision and moves no alias."""


class Reward(Settings):
    """One thing that answers are rewarded for. A bare ref means a reward adapter of weight 1.

    Exactly one of `adapter`, `model`, `function` and `judge` says what gives the reward.
    """

    adapter: Ref | None = None
    """A reward adapter of the store, made by stage `rm` on the same base; it shares the base in memory."""
    model: BaseModelName | None = None
    """A sequence-classification model with one label, as a folder or a Hugging Face id, of any family: it
    reads the text through its own tokenizer and chat template."""
    trust_remote_code: bool = False
    """Run the Python code that comes with that `model`, which then can do whatever you can do."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function` of your own: takes a list of conversations (OpenAI messages, the answer last), and
    returns as many numbers."""
    judge: Url | None = None
    """An OpenAI-compatible endpoint whose model gives marks, such as http://127.0.0.1:8000/v1."""
    judge_model: str | None = None
    """The `model` asked for at the judge."""
    judge_prompt: str | None = None
    """What the judge is told; it must answer with one number. `{conversation}`, `{answer}` and `{reference}`
    are filled in; other braces are written twice."""
    weight: float = 1.0
    """The rewards are added up after each is multiplied by its weight."""

    @model_validator(mode="before")
    @classmethod
    def _from_ref(cls, value: Any) -> Any:
        return {"adapter": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [
            kind for kind in ("adapter", "model", "function", "judge") if getattr(self, kind) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of adapter, model, function and judge, not {' and '.join(given) or 'none'}"
            )
        if self.trust_remote_code and self.model is None:
            raise ValueError("trust_remote_code has no effect without model")
        if (self.judge is None) != (self.judge_model is None):
            raise ValueError("judge and judge_model go together")
        if self.judge_prompt is not None and self.judge is None:
            raise ValueError("judge_prompt has no effect without judge")
        try:
            (self.judge_prompt or "").format(conversation="", answer="", reference="")
        except (ValueError, LookupError, AttributeError) as error:
            raise ValueError(
                "judge_prompt: write braces twice, but for {conversation}, {answer} and {reference}"
            ) from error
        return self
