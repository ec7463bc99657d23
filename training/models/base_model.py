"""The base model with its tokenizer, as a job asks for it, and what rests on it in the store."""

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from adapters import AdapterError, AdapterRef, AdapterStore, Manifest, fingerprint
from adapters.validate import TEMPLATE_FILE
from training.config import AdapterJob, RopeScaling
from training.errors import ConfigError
from training.models.remote_code import own_code_refused
from training.models.reward_head import read_by_mask
from training.templates import named
from training.tokens.loss_mask import let_control_tokens_be
from training.tokens.stop_tokens import Stops, find_stops

log = logging.getLogger(__name__)

_BASE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def load_scorer(folder: Path, **loading: Any) -> Any:
    """A base model with a new head of one number; transformers' report, that it finds none, is not shown."""
    shown = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, **loading)
    finally:
        transformers_logging.set_verbosity(shown)


@dataclass(frozen=True)
class Base:
    """A base model on disk, and its tokenizer."""

    folder: Path
    name: str
    """How a manifest names it: its hub id, or the last part of its folder, never a host path."""
    fingerprint: str
    tokenizer: Any
    template: str | None
    """The chat template that an adapter brings along; None where it is the base's own."""
    stops: Stops
    """What ends an answer."""
    quantization: str | None = None
    """`4bit` or `8bit`: how it is held while an adapter is trained on it."""
    rope_scaling: RopeScaling | None = None
    trust_remote_code: bool = False

    def causal_lm(self, *, plain: bool = False, dtype: torch.dtype | None = None) -> Any:
        """The model: bfloat16 on a GPU that knows it, float32 anywhere else. It knows all stop tokens.

        `plain`: as a server loads it, without quantisation.
        """
        model = AutoModelForCausalLM.from_pretrained(self.folder, **self._loading(plain, dtype))
        _let_gradients_pass(model)
        model.generation_config.eos_token_id = list(self.stops.token_ids) or None
        return model

    def scorer(self) -> Any:
        """The model with a new head of one number in the place of its vocabulary."""
        loading = self._loading(plain=False, dtype=None)
        loading["config"].num_labels = 1
        model = load_scorer(self.folder, **loading)
        _let_gradients_pass(model)
        read_by_mask(model)
        return model

    def config(self) -> Any:
        """What config.json says, with the context stretched as the job asks. Raises ConfigError."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        if self.rope_scaling is not None:
            stretch(config, self.rope_scaling, self.name)
        return config

    @property
    def positions(self) -> int | None:
        """Tokens that a server gives prompt and answer together; None where the model sets no limit."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def longest(self, config: AdapterJob) -> int:
        """The most tokens of a row: `max_length`, as far as the model has positions for it and for what it answers.

        Raises ConfigError if none are left.
        """
        answer = config.longest_answer
        there = getattr(self.config().get_text_config(), "max_position_embeddings", None)
        if there is not None and self.rope_scaling is not None:
            there = int(there * self.rope_scaling.factor)
        if there is None or config.max_length + answer <= there:
            return config.max_length
        if there <= answer:
            raise ConfigError(
                f"max_new_tokens: {self.name} has {there} positions, for prompt and answer together"
            )
        log.warning(
            "%s has %d positions: rows of at most %d tokens are learnt from, not of max_length %d",
            self.name, there, there - answer, config.max_length,
        )  # fmt: skip
        return there - answer

    def _loading(self, plain: bool, dtype: torch.dtype | None) -> dict[str, Any]:
        loading: dict[str, Any] = {
            "config": self.config(),
            "dtype": dtype or _dtype(),
            "trust_remote_code": self.trust_remote_code,
        }
        if self.quantization is None or plain:
            return loading
        here = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        # Quantised weights are made where they stay: no trainer can move them.
        return loading | {"quantization_config": _quantized(self.quantization), "device_map": {"": here}}


def _quantized(bits: str) -> BitsAndBytesConfig:
    """Raises ConfigError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError("quantization needs bitsandbytes: pip install bitsandbytes")
    heads = ["lm_head", "score"]  # what the loss is read from stays as it is
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(),
        llm_int8_skip_modules=heads,
    )


def _let_gradients_pass(model: Any) -> None:
    """Keep bitsandbytes (0.50) from packing 4-bit weights for inference, which it does where the CPU has AVX512-BF16.

    It does so when a model is first evaluated, and for good: from then on no gradient passes them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def stretch(config: Any, asked: RopeScaling, name: str) -> None:
    """Stretch the context that a model's config.json gives it. Raises ConfigError where that cannot be done."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or not isinstance(rope.get("rope_theta"), int | float):
        raise ConfigError(
            f"rope_scaling: {name} has no rotary positions, or others in each kind of layer, which cannot be "
            "stretched here: leave it out"
        )
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_scaling: {name} is stretched already ({rope['rope_type']}): leave it out")
    stretched = {**rope, "rope_type": asked.type, "factor": asked.factor}
    if asked.type == "yarn":
        stretched["original_max_position_embeddings"] = config.max_position_embeddings
    config.rope_parameters = stretched


def find_base(config: AdapterJob, store: AdapterStore, *, must_chat: bool = True) -> Base:
    """The base model of a job, downloaded if need be, with the chat template that the job is to use.

    Raises ConfigError for one that cannot be had, or, where it `must_chat`, that has no chat template, without
    which it cannot hold a conversation; AdapterError for a folder that is no base model.
    """
    trust = config.trust_remote_code
    folder = base_folder(config.base_model, trust_remote_code=trust)
    digest = fingerprint(folder)  # of no model, it fails with a better word than the loaders
    with own_code_refused(f"base_model: {base_name(config.base_model)}", "set `trust_remote_code: true`"):
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    _let_padding_be_known(tokenizer, model_config)
    if config.control_tokens == "tokens":
        let_control_tokens_be(tokenizer)
    template, asked = _template(config, store)
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None and must_chat:
        raise ConfigError(
            f"base_model: {folder.name} has no chat template; give it one by `chat_template:` and a name, such as "
            "alpaca or chatml"
        )
    return Base(
        folder,
        base_name(config.base_model),
        digest,
        tokenizer,
        template,
        find_stops(folder, model_config, tokenizer, asked.texts, asked.token_ids),
        config.quantization,
        config.rope_scaling,
        trust,
    )


def _let_padding_be_known(tokenizer: Any, config: Any) -> None:
    """Some tokenizers have no padding token, or one past the embeddings, which the model cannot look up.

    Any token does: whatever is filled up is masked.
    """
    pad, rows = tokenizer.pad_token_id, config.get_text_config().vocab_size
    if pad is None or pad >= rows:
        end = tokenizer.eos_token_id
        tokenizer.pad_token_id = end if end is not None and end < rows else 0


def _template(config: AdapterJob, store: AdapterStore) -> tuple[str | None, Stops]:
    """The chat template that a job names, or that the adapter it goes on with has; and what ends its answers."""
    if config.chat_template is not None:
        chosen = named(config.chat_template)
        return chosen.jinja, Stops(texts=chosen.stop)
    if config.starts_from is None:
        return None, Stops()
    manifest, folder = find_adapter(store, config.starts_from)
    path = folder / TEMPLATE_FILE
    template = path.read_text(encoding="utf-8") if path.exists() else None
    return template, Stops(tuple(manifest.stop_token_ids), tuple(manifest.stop))


def base_folder(base_model: str, *, trust_remote_code: bool = False) -> Path:
    """The folder of a base model, downloaded first if `base_model` is a Hugging Face id; its code only if trusted.

    Raises ConfigError when it is neither a folder nor a model that the hub, or its cache here, has.
    """
    folder = Path(base_model)
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(base_model, allow_patterns=[*_BASE_FILES, *("*.py",) * trust_remote_code])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"base_model: {base_model} is no folder here, and the Hugging Face hub cannot give it: {error}"
        ) from error


def base_name(base_model: str) -> str:
    """How a manifest names the base: its hub id, or the last part of its folder, never a host path."""
    return Path(base_model).resolve().name if Path(base_model).is_dir() else base_model


def find_adapter(store: AdapterStore, ref: str) -> tuple[Manifest, Path]:
    """A published adapter and its folder. Raises ConfigError."""
    try:
        manifest = store.get(AdapterRef.parse(ref))
    except AdapterError as error:
        raise ConfigError(f"{ref}: {error}; `python -m adapters list` shows what there is") from error
    return manifest, store.folder(manifest.name, manifest.revision)


def check_base(manifest: Manifest, base: Base, task: str = "chat") -> None:
    """Raises ConfigError unless an adapter is of that task and rests on this very base model."""
    ref = manifest.ref
    if manifest.task != task:
        raise ConfigError(f"{ref} is a {manifest.task} adapter; a {task} adapter is needed here")
    if manifest.base_fingerprint != base.fingerprint:
        raise ConfigError(
            f"{ref} was trained on {manifest.base_model} ({manifest.base_fingerprint}), which is not the base "
            f"model of this job, {base.name} ({base.fingerprint}): give the same base_model"
        )


def _dtype() -> torch.dtype:
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
