"""Estimates how much memory a job needs from the config.json of its base model, without reading weights.

It runs the phases with the highest use (generating answers, scoring them, learning from a batch) on tensors with shapes
but no contents, every row as long as max_length. It adds measured values for memory outside tensors (the CUDA context,
kernels' workspaces, the allocator's waste).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from adapters import AdapterStore
from training.config import AdapterJob, GrpoConfig, OfflineJob, PpoConfig, PtConfig, RmConfig, SftConfig
from training.errors import ConfigError
from training.estimate.memory import Ledger
from training.models.base_model import find_adapter
from training.models.lora import lora_config
from training.trainers.cpu_head import is_frozen_product, score
from training.trainers.forgetting import LOGITS, LOGITS_AT_ONCE

GIB = 2**30
_FRAMEWORK = {"cpu": 0.1 * GIB, "cuda": 0.7 * GIB}
"""Bytes outside tensors."""
_SLACK = {"cpu": 1.25, "cuda": 1.05}
"""Factor for freed memory that the allocator keeps: glibc's measured (tests/bench/train/memory.py), CUDA's guessed."""
_BYTES_QUANTISED = {"8bit": 1.0, "4bit": 0.516}
"""Bytes per weight of a linear layer; nf4 includes its scales, which are quantised too."""
_TILE = 4096, 32768
"""Tokens and vocabulary entries that TRL's fused head computes at a time."""
_TILE_COPIES = {"cpu": 8.25, "cuda": 1.0}
"""The most float32 tensors of that size at a time: torch operations on a CPU, one kernel on a GPU."""


@dataclass(frozen=True)
class Estimate:
    """The memory of one process of a job on its device, in bytes; the sum of `parts` is the peak."""

    device: str
    moment: str
    """The phase with the peak."""
    parts: dict[str, int]
    trainable: int
    """Number of trainable weights."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def estimate(config: AdapterJob, store: AdapterStore, device: str = "cuda") -> Estimate:
    """Estimate the memory of one process on `device` ("cpu" or "cuda").

    Raises ConfigError if the base model's config cannot be read, or has an unknown architecture.
    """
    job = _Job(config, device, _read_config(config.base_model, config.trust_remote_code))
    with torch.device("meta"):
        model = job.model()
        if not config.is_full:
            model = get_peft_model(model, _adapter_shape(config, store, model))
    plain = sum(_size(weight) for weight in model.parameters() if not weight.requires_grad)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    adapter = sum(map(_size, learning))
    moments = {name: work(model) for name, work in job.moments().items()}
    worst = max(moments, key=lambda name: moments[name])
    parts = {
        "frozen weights": plain - job.saved_by_quantisation(model),
        "trainable weights": adapter,
        "gradients and optimizer": 3 * adapter,  # AdamW keeps two values per weight
        "reference, rewards": job.others(plain, adapter),
        "activations, logits, cache": max(
            0, moments[worst] - adapter if worst == "learning" else moments[worst]
        ),
    }
    parts["framework, allocator"] = int(_FRAMEWORK[device] + (_SLACK[device] - 1) * sum(parts.values()))
    return Estimate(device, worst, parts, sum(weight.numel() for weight in learning))


@dataclass(frozen=True)
class _Job:
    """The parts of a job's config that decide its memory."""

    config: AdapterJob
    device: str
    base: Any

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" and not self.config.is_full else torch.float32

    @property
    def is_checkpointing(self) -> bool:
        config = self.config
        asked = config.gradient_checkpointing if isinstance(config, OfflineJob | GrpoConfig) else None
        return self.device == "cuda" if asked is None else asked

    def model(self) -> Any:
        kind = AutoModelForSequenceClassification if self.config.stage == "rm" else AutoModelForCausalLM
        return kind.from_config(self.base, dtype=self.dtype, trust_remote_code=self.config.trust_remote_code)

    def moments(self) -> dict[str, Any]:
        """Return the phases that may have the peak: functions from model to bytes beside weights and optimizer."""
        config, length = self.config, self.config.max_length
        rows = config.batch_size * (2 if config.in_pairs else 1)
        moments = {"learning": lambda model: self._learn(model, config.rows_learnt, length)}
        if config.has_reference:
            moments["scoring"] = lambda model: self._score(model, rows, length)
        if config.generates:
            moments["generating"] = lambda _: self._cache(rows, length)
        if config.general_files:
            moments["measuring general_files"] = lambda _: self._measure(config.batch_size, length)
        return moments

    def others(self, weights: int, adapter: int) -> int:
        """Return the bytes of adapters and models that are not trained."""
        copies = adapter if self.config.has_reference and self.config.starts_from else 0
        for reward in self.config.rewards:
            if (
                reward.adapter
            ):  # ppo loads it onto the policy's base model; with TRL's trainers it needs its own
                copies += adapter if self.config.stage == "ppo" else weights + adapter
            elif reward.model:
                with torch.device("meta"):
                    scorer = AutoModelForSequenceClassification.from_config(
                        _read_config(reward.model, trust=False), dtype=self.dtype
                    )
                copies += sum(map(_size, scorer.parameters()))
        return copies

    def saved_by_quantisation(self, model: Any) -> int:
        """Return the bytes that quantised linear layers save, less one layer that is unpacked during computation."""
        if self.config.quantization is None:
            return 0
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        layers = [
            module.weight for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
        ]  # fmt: skip
        rest = _BYTES_QUANTISED[self.config.quantization]
        saved = sum(_size(weight) - int(rest * weight.numel()) for weight in layers)
        return saved - max(map(_size, layers))

    def _learn(self, model: Any, rows: int, length: int) -> int:
        """Return the bytes of one step's forward and backward passes, including the gradients."""
        model.train()
        if self.is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            model.enable_input_require_grads()
        passes = min(2, _accumulation(self.config))
        with FakeTensorMode(), Ledger() as ledger:
            _give_storage(model)
            before = ledger.held
            for _ in range(passes):
                self._loss(model, rows, length).backward()
            return ledger.peak - before + _mask(rows, length)

    def _score(self, model: Any, rows: int, length: int) -> int:
        model.eval()
        with FakeTensorMode(), Ledger() as ledger, torch.no_grad():
            _give_storage(model)
            before = ledger.held
            self._loss(model, rows, length)
            return ledger.peak - before + _mask(rows, length)

    def _loss(self, model: Any, rows: int, length: int) -> Tensor:
        token_ids = torch.zeros((rows, length), dtype=torch.long)
        inner = model if self.config.is_full else model.get_base_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.device == "cuda"):
            if self.config.stage == "orpo":
                logits = model(input_ids=token_ids, use_cache=False).logits
                liked = nn.functional.cross_entropy(
                    logits[: rows // 2].flatten(0, 1).float(), token_ids[: rows // 2].flatten()
                )
                return liked + _chosen(logits, token_ids).sum()
            if self.config.stage == "ppo":
                kept = self.config.longest_answer + 1
                out = model(
                    input_ids=token_ids, use_cache=False, logits_to_keep=kept, output_hidden_states=True
                )
                hidden = out.hidden_states[-1][:, -kept:-1].float()
                scores = _chosen(out.logits[:, :-1].float(), token_ids[:, : kept - 1])
                return scores.sum() + hidden.sum()
            hidden = inner.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
            if self.config.stage == "rm":
                return inner.score(hidden).float().sum()
            head = inner.get_output_embeddings()
            if (
                self.device == "cpu"
                and isinstance(self.config, PtConfig | SftConfig)
                and is_frozen_product(head)
            ):
                return score(hidden.flatten(0, 1), head.weight, token_ids.flatten())[0].sum()
        copies = _TILE_COPIES[self.device]
        tile = min(rows * length, _TILE[0]), min(self.base.get_text_config().vocab_size, _TILE[1])
        loss: Tensor = _FusedHead.apply(hidden, math.ceil(copies * tile[0]), tile[1])
        return loss

    def _cache(self, rows: int, length: int) -> int:
        """Return the bytes of the KV cache and of one token's logits."""
        text = self.base.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys = rows * length * text.num_hidden_layers * 2 * heads * size * self.dtype.itemsize
        return int(keys + 3 * rows * text.vocab_size * 4)

    def _measure(self, rows: int, length: int) -> int:
        """Return the bytes of a batch's logits and of their conversion to float32 piece by piece."""
        row = length * int(self.base.get_text_config().vocab_size)
        logits = min(rows * row, max(LOGITS, row))
        copies = self.dtype.itemsize + (4 if self.dtype != torch.float32 else 0)  # accelerate's
        return logits * copies + 3 * 4 * min(logits, LOGITS_AT_ONCE)


class _FusedHead(torch.autograd.Function):
    """Has the memory use of TRL's fused head: one tile of logits at a time, and a float32 gradient of hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: int, vocabulary: int) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.tile = tokens, vocabulary
        hidden.new_empty(ctx.tile, dtype=torch.float32)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        (hidden,) = ctx.saved_tensors
        gradient = torch.empty_like(hidden, dtype=torch.float32)
        hidden.new_empty(ctx.tile, dtype=torch.float32)
        return gradient.to(hidden.dtype), None, None


def _mask(rows: int, length: int) -> int:
    """Return the bytes of the attention mask of padded or packed rows: one per pair of tokens of a row."""
    return rows * length**2


def _chosen(logits: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, token_ids[..., None])


def _size(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _give_storage(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake tensors, which the ledger counts."""
    given: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in given:  # embeddings may be tied
                    made = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    given[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_weight else made
                table[name] = given[id(tensor)]


def _read_config(model: str, trust: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model: its config.json cannot be read: {error}") from error


def _adapter_shape(config: AdapterJob, store: AdapterStore, model: Any) -> LoraConfig:
    """Return the LoRA config of the adapter that the job continues from, or of a new one."""
    if config.starts_from is not None:
        shape = LoraConfig.from_pretrained(find_adapter(store, config.starts_from)[1])
        shape.inference_mode, shape.base_model_name_or_path = False, None
        return shape
    if isinstance(config, RmConfig):
        return lora_config(config.lora, TaskType.SEQ_CLS, model, modules_to_save=["score"])
    return lora_config(config.lora, TaskType.CAUSAL_LM, model)


def report(config: AdapterJob, store: AdapterStore, device: str | None = None) -> list[str]:
    """Return the estimate as lines of a table, with the free memory and, if the job does not fit, settings that do.

    `device`: "cpu" or "cuda"; None is a GPU if there is one, else the CPU. Raises ConfigError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = estimate(config, store, device)
    lines = [f"{name:28} {size / GIB:8.2f} GiB" for name, size in found.parts.items()]
    lines.append(f"{'peak, ' + found.moment:28} {found.total / GIB:8.2f} GiB")
    lines.append(
        f"{found.trainable / 1e6:.1f} million trainable weights; every row counted as max_length long"
    )
    there = _there(device)
    if not there:
        return [*lines, "no GPU here to compare with; each process of a launcher needs this much"]
    where = "on each GPU" if device == "cuda" else "memory"
    lines.append(f"{'free ' + where:28} {there / GIB:8.2f} GiB")
    return lines if found.total <= there else [*lines, _remedy(config, store, device, there)]


def _there(device: str) -> int:
    """Return the free bytes of the device with the least; 0 if there is no device."""
    if device == "cpu":
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return min((torch.cuda.mem_get_info(at)[0] for at in range(torch.cuda.device_count())), default=0)


def _remedy(config: AdapterJob, store: AdapterStore, device: str, there: int) -> str:
    """Return the first settings that make the job fit, each added to the previous ones."""
    changes: dict[str, Any] = {}
    for change in _changes(config):
        changes |= change
        changed = config.model_copy(update=changes)
        if estimate(changed, store, device).total <= there:
            return "it does not fit; it fits with " + ", ".join(f"{k}: {v}" for k, v in _words(changes))
    return "it does not fit, and no setting here helps: use a smaller base model or a larger device"


def _changes(config: AdapterJob) -> Iterator[dict[str, Any]]:
    """Yield the changes that save memory, the least harmful first."""
    if isinstance(config, OfflineJob | GrpoConfig):
        yield {"gradient_checkpointing": True}
    rows, smallest = config.batch_size, config.generations if isinstance(config, GrpoConfig) else 1
    if isinstance(config, PpoConfig):
        yield {"minibatch_size": 1}
    elif isinstance(config, OfflineJob) and rows > 1:
        yield {"batch_size": 1, "gradient_accumulation_steps": rows * _accumulation(config)}
    elif rows > smallest:
        yield {"batch_size": smallest}
    if not config.is_full:
        yield {"quantization": "4bit"}
    if config.max_length > 512:
        yield {"max_length": 512}


def _accumulation(config: AdapterJob) -> int:
    return config.gradient_accumulation_steps if isinstance(config, OfflineJob) else 1


def _words(changes: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in changes.items():
        yield name, str(value).lower() if isinstance(value, bool) else str(value)
