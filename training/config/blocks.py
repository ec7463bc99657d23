"""Config blocks that several stages share."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from training.config.fields import Alias, BaseModelName, Ref, Settings, Url

# Head sizes that vLLM's CPU attention supports. With any other, the engine starts and dies on its first request.
_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class BaseModelSize(Settings):
    """Size of a model built from scratch; field names as in transformers.Qwen3Config."""

    vocab_size: int = Field(default=2048, ge=300, multiple_of=64)
    """Vocabulary size of the byte-level BPE tokenizer, which is trained on the data."""
    hidden_size: int = Field(default=192, ge=32)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=512, ge=32)
    """Width of the feed-forward layers."""
    num_hidden_layers: int = Field(default=3, ge=1)
    """Number of layers."""
    num_attention_heads: int = Field(default=3, ge=1)
    """Number of query heads."""
    num_key_value_heads: int = Field(default=1, ge=1)
    """Number of key and value heads; must divide num_attention_heads."""
    head_dim: int = 64
    """Size of one head; limited to the sizes that the serving engine supports on CPU."""
    max_position_embeddings: int = Field(default=1024, ge=64)
    """Longest context, in tokens."""
    initializer_range: float = Field(default=0.06, gt=0)
    """Standard deviation of the initial weights; small models need more than the usual 0.02."""

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if self.head_dim not in _HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {', '.join(map(str, _HEAD_DIMS))}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        return self


class Lora(Settings):
    """The adapter's shape; field names as in PEFT."""

    r: int = Field(default=16, ge=1, le=512)
    """Rank. The serving engine's max_lora_rank must be at least this."""
    lora_alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input during training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter: `all-linear` (all except lm_head, in any architecture) or a list such as
    [q_proj, v_proj]."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead, which is stable at high ranks."""
    use_dora: bool = False
    """Learn magnitude and direction of each weight separately (arXiv:2402.09353). Needs `merge: true`: the serving
    engine does not load DoRA adapters."""
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None = None
    """Modules trained in full, such as [embed_tokens, lm_head]. Needs `merge: true`: the serving engine does not load
    such adapters."""


class RopeScaling(Settings):
    """Extend the base model's context by scaling its rotary positions."""

    type: Literal["linear", "dynamic", "yarn"]
    """`linear` (arXiv:2306.15595), `dynamic` (NTK-aware, grows with the text) or `yarn` (arXiv:2309.00071)."""
    factor: float = Field(gt=1)
    """Factor by which the context grows."""


class Golden(Settings):
    """Golden prompts: the serving engine must reproduce the trainer's answers to them."""

    prompts: int = Field(default=12, ge=8, le=20)
    """Number of prompts, sampled evenly from the evaluation rows, or from the training rows if there are none."""
    max_new_tokens: int = Field(default=64, ge=1, le=1024)
    """Maximum length of a golden answer, in tokens; decoding is greedy."""


class Publish(Settings):
    """What the run does in the adapter store when it succeeds."""

    alias: Alias | None = None
    """Alias to point at the new revision; servers that follow it load, prove and serve the revision. Default: publish
    the revision and move no alias."""


class Reward(Settings):
    """One source of rewards. A bare ref means a reward adapter of weight 1.

    Set exactly one of `adapter`, `model`, `function` and `judge`.
    """

    adapter: Ref | None = None
    """A reward adapter in the store, trained by stage `rm` on the same base; it shares the base in memory."""
    model: BaseModelName | None = None
    """A sequence-classification model with one label: a folder or a Hugging Face id. Any family works, since the model
    uses its own tokenizer and chat template."""
    trust_remote_code: bool = False
    """Run the Python code that comes with `model`, with your permissions."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function` of your own. It takes a list of conversations (OpenAI messages, the answer last) and returns
    one number for each."""
    judge: Url | None = None
    """An OpenAI-compatible endpoint whose model scores the answers, such as http://127.0.0.1:8000/v1."""
    judge_model: str | None = None
    """The `model` in requests to the judge."""
    judge_prompt: str | None = None
    """The prompt for the judge, which must reply with one number. `{conversation}`, `{answer}` and `{reference}` are
    filled in; double every other brace. Default: a built-in prompt that asks for a score from 0 to 10."""
    weight: float = 1.0
    """Factor of this reward in the weighted sum."""

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
                f"set exactly one of adapter, model, function and judge, not {' and '.join(given) or 'none'}"
            )
        if self.trust_remote_code and self.model is None:
            raise ValueError("trust_remote_code has no effect without model")
        if (self.judge is None) != (self.judge_model is None):
            raise ValueError("set judge and judge_model together")
        if self.judge_prompt is not None and self.judge is None:
            raise ValueError("judge_prompt has no effect without judge")
        try:
            (self.judge_prompt or "").format(conversation="", answer="", reference="")
        except (ValueError, LookupError, AttributeError) as error:
            raise ValueError(
                "judge_prompt: double every brace except those of {conversation}, {answer} and {reference}"
            ) from error
        return self
