"""How much memory a job needs, told from the config.json of its base model before any weight is read.

The job's largest moments (generating answers, scoring them, learning from a batch) are gone through with tensors
of shapes and no contents, every row as long as max_length allows. What a framework holds beside its tensors
(a CUDA context, kernels' workspaces, the allocator's waste) is added as measured.
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
"""Bytes that no tensor holds."""
_SLACK = {"cpu": 1.25, "cuda": 1.05}
"""Freed memory that the allocator keeps: glibc's as measured (tests/bench/train/memory.py), CUDA's a guess."""
_BYTES_QUANTISED = {"8bit": 1.0, "4bit": 0.516}
"""For one weight of a linear layer; nf4 with its scales, themselves quantised."""
_TILE = 4096, 32768
"""Tokens and vocabulary that TRL's fused head works on at a time."""
_TILE_COPIES = {"cpu": 8.25, "cuda": 1.0}
"""Float32 tensors of that size at its worst moment: torch operations on a CPU, one kernel on a GPU."""


@dataclass(frozen=True)
class Estimate:
    """What one process of a job needs on its device, in bytes; the sum of `parts` is the peak."""

    device: str
    moment: str
    """When it needs the most."""
    parts: dict[str, int]
    trainable: int
    """Weights that learn."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def estimate(config: AdapterJob, store: AdapterStore, device: str = "cuda") -> Estimate:
    """The memory one process needs on `device` ("cpu" or "cuda").

    Raises ConfigError if the base model's config cannot be had, or is of no architecture that is known here.
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
        "weights that learn": adapter,
        "gradients and optimizer": 3 * adapter,  # AdamW keeps two numbers for each weight
        "reference, rewards": job.others(plain, adapter),
        "activations, logits, cache": max(
            0, moments[worst] - adapter if worst == "learning" else moments[worst]
        ),
    }
    parts["framework, allocator"] = int(_FRAMEWORK[device] + (_SLACK[device] - 1) * sum(parts.values()))
    return Estimate(device, worst, parts, sum(weight.numel() for weight in learning))


@dataclass(frozen=True)
class _Job:
    """What of a config decides about memory."""

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
        """What may need the most, each as a function of the model that gives bytes beside weights and optimizer."""
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
        """Adapters and models that are only read."""
        copies = adapter if self.config.has_reference and self.config.starts_from else 0
        for reward in self.config.rewards:
            if reward.adapter:  # ppo puts it on the base it has; TRL's trainers want a model of its own
                copies += adapter if self.config.stage == "ppo" else weights + adapter
            elif reward.model:
                with torch.device("meta"):
                    scorer = AutoModelForSequenceClassification.from_config(
                        _read_config(reward.model, trust=False), dtype=self.dtype
                    )
                copies += sum(map(_size, scorer.parameters()))
        return copies

    def saved_by_quantisation(self, model: Any) -> int:
        """Bytes that quantised linear layers do not need, less one layer that is unpacked to be worked with."""
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
        """Bytes that one step's forward and backward passes need, with the gradients they leave."""
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
        """Keys and values of all tokens, and a token's logits."""
        text = self.base.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys = rows * length * text.num_hidden_layers * 2 * heads * size * self.dtype.itemsize
        return int(keys + 3 * rows * text.vocab_size * 4)

    def _measure(self, rows: int, length: int) -> int:
        """The logits of a batch, beside which they are made float32 piece by piece."""
        row = length * int(self.base.get_text_config().vocab_size)
        logits = min(rows * row, max(LOGITS, row))
        copies = self.dtype.itemsize + (4 if self.dtype != torch.float32 else 0)  # accelerate's
        return logits * copies + 3 * 4 * min(logits, LOGITS_AT_ONCE)


class _FusedHead(torch.autograd.Function):
    """Stands for TRL's: no logits but one tile of them at a time, and a float32 gradient of the hidden states."""

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
    """One byte for each pair of tokens of a row, where rows differ in length or are packed."""
    return rows * length**2


def _chosen(logits: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, token_ids[..., None])


def _size(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _give_storage(model: nn.Module) -> None:
    """Replace what is on the meta device by fake tensors, which are counted."""
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
        raise ConfigError(f"base_model: its config.json cannot be had: {error}") from error


def _adapter_shape(config: AdapterJob, store: AdapterStore, model: Any) -> LoraConfig:
    """Of the adapter that training goes on with, or a fresh one's."""
    if config.starts_from is not None:
        shape = LoraConfig.from_pretrained(find_adapter(store, config.starts_from)[1])
        shape.inference_mode, shape.base_model_name_or_path = False, None
        return shape
    if isinstance(config, RmConfig):
        return lora_config(config.lora, TaskType.SEQ_CLS, model, modules_to_save=["score"])
    return lora_config(config.lora, TaskType.CAUSAL_LM, model)


def report(config: AdapterJob, store: AdapterStore, device: str | None = None) -> list[str]:
    """The estimate as lines of a table; against what there is, and with what would make the job fit, if it does not.

    `device`: "cpu" or "cuda"; None for a GPU if there is one, and the CPU if not. Raises ConfigError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = estimate(config, store, device)
    lines = [f"{name:28} {size / GIB:8.2f} GiB" for name, size in found.parts.items()]
    lines.append(f"{'needed at most, ' + found.moment:28} {found.total / GIB:8.2f} GiB")
    lines.append(f"{found.trainable / 1e6:.1f} million weights learn; every row counted as max_length long")
    there = _there(device)
    if not there:
        return [*lines, "there is no GPU here to compare with; each process of a launcher needs as much"]
    where = "each GPU" if device == "cuda" else "memory"
    lines.append(f"{where + ' has free':28} {there / GIB:8.2f} GiB")
    return lines if found.total <= there else [*lines, _remedy(config, store, device, there)]


def _there(device: str) -> int:
    """Free bytes of the smallest device; 0 where there is none."""
    if device == "cpu":
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return min((torch.cuda.mem_get_info(at)[0] for at in range(torch.cuda.device_count())), default=0)


def _remedy(config: AdapterJob, store: AdapterStore, device: str, there: int) -> str:
    """The first settings that make the job fit, each added to those before it."""
    changes: dict[str, Any] = {}
    for change in _changes(config):
        changes |= change
        changed = config.model_copy(update=changes)
        if estimate(changed, store, device).total <= there:
            return "it does not fit; it does with " + ", ".join(f"{k}: {v}" for k, v in _words(changes))
    return "it does not fit, with no setting here: take a smaller base model or a larger device"


def _changes(config: AdapterJob) -> Iterator[dict[str, Any]]:
    """What takes memory away, the least harmful first."""
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
