"""The base model and tokenizer of a job, and the lookup of published adapters on that base model."""

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
    """Load a base model with a new one-number head; hide transformers' report that the head is missing."""
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
    """The name in a manifest: its hub id, or the last part of its folder, never a host path."""
    fingerprint: str
    tokenizer: Any
    template: str | None
    """The chat template to save with the adapter; None if it is the base model's own."""
    stops: Stops
    """Stop tokens and stop strings of an answer."""
    quantization: str | None = None
    """`4bit` or `8bit`: the weight format during training of an adapter."""
    rope_scaling: RopeScaling | None = None
    trust_remote_code: bool = False

    def causal_lm(self, *, plain: bool = False, dtype: torch.dtype | None = None) -> Any:
        """Load the model: bfloat16 on a GPU that supports it, else float32. Its eos_token_id lists all stop tokens.

        `plain`: as a server loads it, without quantisation.
        """
        model = AutoModelForCausalLM.from_pretrained(self.folder, **self._loading(plain, dtype))
        _let_gradients_pass(model)
        model.generation_config.eos_token_id = list(self.stops.token_ids) or None
        return model

    def scorer(self) -> Any:
        """Load the model with a new one-number head in place of its vocabulary head."""
        loading = self._loading(plain=False, dtype=None)
        loading["config"].num_labels = 1
        model = load_scorer(self.folder, **loading)
        _let_gradients_pass(model)
        read_by_mask(model)
        return model

    def config(self) -> Any:
        """Read config.json and apply the job's rope_scaling. Raises ConfigError."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        if self.rope_scaling is not None:
            stretch(config, self.rope_scaling, self.name)
        return config

    @property
    def positions(self) -> int | None:
        """The most tokens of prompt and answer together on a server; None if the model sets no limit."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def longest(self, config: AdapterJob) -> int:
        """Return the most tokens of a row: `max_length`, or fewer if the model has no positions for row and answer.

        Raises ConfigError if no position is left for the row.
        """
        answer = config.longest_answer
        there = getattr(self.config().get_text_config(), "max_position_embeddings", None)
        if there is not None and self.rope_scaling is not None:
            there = int(there * self.rope_scaling.factor)
        if there is None or config.max_length + answer <= there:
            return config.max_length
        if there <= answer:
            raise ConfigError(
                f"max_new_tokens: {self.name} has only {there} positions for prompt and answer together: lower it"
            )
        log.warning(
            "%s has %d positions: rows are limited to %d tokens, not max_length %d",
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
        # No trainer can move quantised weights: create them on their final device.
        return loading | {"quantization_config": _quantized(self.quantization), "device_map": {"": here}}


def _quantized(bits: str) -> BitsAndBytesConfig:
    """Return the bitsandbytes settings. Raises ConfigError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError("quantization needs bitsandbytes: pip install bitsandbytes")
    heads = ["lm_head", "score"]  # the loss is computed from these heads: keep them unquantised
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
    """Keep bitsandbytes (0.50) from packing 4-bit weights for inference on CPUs with AVX512-BF16.

    It packs them on the first evaluation and never unpacks them; no gradient passes packed weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def stretch(config: Any, asked: RopeScaling, name: str) -> None:
    """Stretch the context length in a model's config. Raises ConfigError if the model cannot be stretched."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or not isinstance(rope.get("rope_theta"), int | float):
        raise ConfigError(
            f"rope_scaling: {name} has no rotary positions, or different ones per kind of layer, which cannot be "
            "stretched: remove rope_scaling"
        )
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"rope_scaling: {name} is already stretched ({rope['rope_type']}): remove rope_scaling"
        )
    stretched = {**rope, "rope_type": asked.type, "factor": asked.factor}
    if asked.type == "yarn":
        stretched["original_max_position_embeddings"] = config.max_position_embeddings
    config.rope_parameters = stretched


def find_base(config: AdapterJob, store: AdapterStore, *, must_chat: bool = True) -> Base:
    """Load the tokenizer and facts of a job's base model, with the job's chat template; download it if needed.

    Raises ConfigError if the model cannot be found, or has no chat template although it `must_chat`; AdapterError
    for a folder that is not a base model.
    """
    trust = config.trust_remote_code
    folder = base_folder(config.base_model, trust_remote_code=trust)
    digest = fingerprint(folder)  # first, as its error for a wrong folder is clearer than the loaders'
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
            f"base_model: {folder.name} has no chat template: name one with `chat_template:`, such as alpaca or "
            "chatml"
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
    """Set a padding token where the tokenizer has none, or one past the embeddings, which the model cannot look up.

    Any token works, as padding is masked.
    """
    pad, rows = tokenizer.pad_token_id, config.get_text_config().vocab_size
    if pad is None or pad >= rows:
        end = tokenizer.eos_token_id
        tokenizer.pad_token_id = end if end is not None and end < rows else 0


def _template(config: AdapterJob, store: AdapterStore) -> tuple[str | None, Stops]:
    """Return the chat template and stops that the job names, or those of the adapter that it continues from."""
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
    """Return the folder of a base model; download a Hugging Face id first, its Python code only if trusted.

    Raises ConfigError if it is neither a folder nor a model of the hub or its local cache.
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
            f"base_model: {base_model} is not a folder here, and not available from the Hugging Face hub: {error}"
        ) from error


def base_name(base_model: str) -> str:
    """Return the base model's name in a manifest: its hub id, or the last part of its folder, never a host path."""
    return Path(base_model).resolve().name if Path(base_model).is_dir() else base_model


def find_adapter(store: AdapterStore, ref: str) -> tuple[Manifest, Path]:
    """Return a published adapter's manifest and folder. Raises ConfigError."""
    try:
        manifest = store.get(AdapterRef.parse(ref))
    except AdapterError as error:
        raise ConfigError(
            f"{ref}: {error}; `python -m adapters list` shows the published adapters"
        ) from error
    return manifest, store.folder(manifest.name, manifest.revision)


def check_base(manifest: Manifest, base: Base, task: str = "chat") -> None:
    """Check that an adapter has this task and was trained on exactly this base model. Raises ConfigError."""
    ref = manifest.ref
    if manifest.task != task:
        raise ConfigError(f"{ref} is a {manifest.task} adapter: name a {task} adapter")
    if manifest.base_fingerprint != base.fingerprint:
        raise ConfigError(
            f"{ref} was trained on {manifest.base_model} ({manifest.base_fingerprint}), not on this job's base model "
            f"{base.name} ({base.fingerprint}): set the same base_model"
        )


def _dtype() -> torch.dtype:
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
