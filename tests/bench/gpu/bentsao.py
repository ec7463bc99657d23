"""BenTsao's job on one GPU, its way and ours: LoRA on a model of LLaMA-7B's shape, in batches of 128 rows.

    python -m tests.bench.gpu.bentsao llama_data.json [--rows 8658] [--minutes 10] [--json FILE]
    python -m tests.bench.gpu.bentsao llama_data.json --tiny      # a small model, on a CPU too: does it run?

Measures the training step itself (forward, backward, AdamW) and not stage sft, so that it needs torch, transformers,
PEFT and, for quantised weights, bitsandbytes, and no TRL. From this package it takes what makes our batches,
training/tokens/packing.py. Both ways compute the loss alike, from the logits of every position; the stage's own head,
which does not hold them, saves more.

Weights are random: speed and memory do not depend on them. Tokens are made up, too, as many as LLaMA's tokenizer makes
of such text on average (--tokens-per-character; arXiv:2304.08177 counts 35 for 28 characters). Theirs takes rows in
random order and pads them on the left to the longest, a multiple of 8; ours groups rows by length, or packs them.
A batch that does not fit is halved, and its gradients are added up.

MFU is (4 N + 6 L d s) flops for each token that is no padding, over --peak-tflops: N weights in matrices, whose own
gradients are not computed, L layers of width d, s the length of the token's own row under a causal mask. Computing
activations twice is not counted as work.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from training.tokens.packing import IGNORED, Row, collate, pack

_CUTOFF = 256
_BATCH = 128
_WARM_UP = 2
_PROMPT = "下面是一个问题，运用医学知识来正确回答提问.\n### 问题:\n{question}\n### 回答:\n"
_BATCHES_SORTED = 50  # as transformers does: so many batches of random rows are put in order of length
_TINY = {
    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256,
}  # fmt: skip
GIB = 2**30

Batches = Iterator[list[list[Row]]]
"""Of each step, the batches whose gradients are added up."""
Result = dict[str, Any]


def main() -> None:
    """Print one line for each way, kind of weights and choice of gradient checkpointing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="JSON Lines of instruction and output")
    parser.add_argument("--rows", type=int, default=8658)
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=[*_WAYS])
    parser.add_argument("--weights", nargs="+", choices=["bf16", "nf4", "int8"], default=["bf16", "nf4"])
    parser.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["on", "off"])
    parser.add_argument("--tokens-per-character", type=float, default=1.25)
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bfloat16; 989 is an H100 or H200"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for all of it; each case gets its share")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = _TINY if arguments.tiny else {}
    rows = _read(arguments, LlamaConfig(**shape).vocab_size)
    cases = [(way, is_on == "on") for is_on in arguments.checkpointing for way in arguments.ways]
    seconds = 60 * arguments.minutes / len(cases) / len(arguments.weights)
    found: list[Result] = []
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}; {len(rows)} rows of {sum(map(_length, rows)) / len(rows):.0f} tokens on average\n")
    print(
        "| weights | checkpointing | way | batch | steps | tokens/s | with loss/s | filled | MFU | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for weights in arguments.weights:
        model = _model(weights, shape, device)
        for way, is_checkpointing in cases:
            one = _measure(model, rows, way, is_checkpointing, seconds)
            one |= {"weights": weights, "way": way, "checkpointing": is_checkpointing}
            one["mfu"] = one["flops"] / (arguments.peak_tflops * 1e12)
            found.append(one)
            print(
                f"| {weights} | {'on' if is_checkpointing else 'off'} | {way} | {one['batch']} | {one['steps']} "
                f"| {one['tokens']:,.0f} | {one['learnt']:,.0f} | {one['filled']:.0%} | {one['mfu']:.1%} "
                f"| {one['peak'] / GIB:.1f} |",
                flush=True,
            )
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def _read(arguments: argparse.Namespace, vocabulary: int) -> list[Row]:
    """Rows as long as theirs are in tokens, with labels on the answers, cut as theirs are."""
    chance = random.Random(0)
    rows = []
    for line in arguments.data.read_text(encoding="utf-8").splitlines()[: arguments.rows]:
        said = json.loads(line)
        asked = round(arguments.tokens_per_character * len(_PROMPT.format(question=said["instruction"])))
        length = asked + round(arguments.tokens_per_character * len(said["output"])) + 1
        ids = [chance.randrange(3, vocabulary) for _ in range(length)]
        labels = [IGNORED] * asked + ids[asked:]
        rows.append({"input_ids": ids[:_CUTOFF], "labels": labels[:_CUTOFF]})
    return [row for row in rows if any(label != IGNORED for label in row["labels"])]


def _length(row: Row) -> int:
    return len(row["input_ids"])


# Batches


def _theirs(rows: Sequence[Row], size: int) -> Batches:
    chance = random.Random(0)
    while True:
        order = chance.sample(rows, len(rows))
        for step in _chunks(order, _BATCH):
            yield _chunks(step, size)


def _grouped(rows: Sequence[Row], size: int) -> Batches:
    chance = random.Random(0)
    while True:
        order = chance.sample(rows, len(rows))
        for some in _chunks(order, _BATCHES_SORTED * size):
            steps = _chunks(sorted(some, key=_length), _BATCH)
            for step in chance.sample(steps, len(steps)):  # so that the first ones are like all
                yield _chunks(step, size)


def _packed(rows: Sequence[Row], size: int) -> Batches:
    """As many full rows in a step as hold _BATCH of what is packed."""
    full = pack(rows, _CUTOFF)
    share = len(full) / len(rows)
    chance = random.Random(0)
    while True:
        order = chance.sample(full, len(full))
        for step in _chunks(order, round(_BATCH * share)):
            yield _chunks(step, max(1, round(size * share)))


def _chunks(rows: Sequence[Row], size: int) -> list[Any]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _pad(rows: Sequence[Row], *, left: bool) -> dict[str, torch.Tensor]:
    length = -(-max(map(_length, rows)) // 8) * 8
    batch = {
        "input_ids": torch.zeros((len(rows), length), dtype=torch.long),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.long),
        "labels": torch.full((len(rows), length), IGNORED),
    }
    for at, row in enumerate(rows):
        place = slice(length - _length(row), None) if left else slice(_length(row))
        batch["input_ids"][at, place] = torch.tensor(row["input_ids"])
        batch["labels"][at, place] = torch.tensor(row["labels"])
        batch["attention_mask"][at, place] = 1
    return batch


_WAYS: dict[
    str, tuple[Callable[[Sequence[Row], int], Batches], Callable[[Sequence[Row]], dict[str, torch.Tensor]]]
]
_WAYS = {
    "theirs": (_theirs, lambda rows: _pad(rows, left=True)),
    "ours": (_grouped, lambda rows: _pad(rows, left=False)),
    "ours, packed": (_packed, collate),
}


# The model


def _model(weights: str, shape: dict[str, int], device: str) -> Any:
    """With BenTsao's adapter on it."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        model = LlamaForCausalLM(LlamaConfig(**shape))
        torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if weights != "bf16":
        _quantise(model, weights, device)
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora).train()


def _quantise(model: Any, weights: str, device: str) -> None:
    """Every linear layer but the head, as loading a checkpoint in so many bits does it."""
    bnb: Any = import_module("bitsandbytes").nn
    linear = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    for name, module in linear:
        if name == "lm_head":
            continue
        sizes = module.in_features, module.out_features
        new: Any
        if weights == "nf4":
            new = bnb.Linear4bit(*sizes, bias=False, compute_dtype=module.weight.dtype, quant_type="nf4")
            new.weight = bnb.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
        else:
            new = bnb.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.weight = bnb.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.to(device))
    setattr(model, "is_loaded_in_4bit" if weights == "nf4" else "is_loaded_in_8bit", True)


# One case


def _measure(model: Any, rows: list[Row], way: str, is_checkpointing: bool, seconds: float) -> Result:
    size = _BATCH
    while True:
        try:
            return _try(model, rows, way, is_checkpointing, seconds, size)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def _try(model: Any, rows: list[Row], way: str, is_checkpointing: bool, seconds: float, size: int) -> Result:
    batches_of, collated = _WAYS[way]
    if is_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=3e-4)
    counts = {"tokens": 0.0, "learnt": 0.0, "positions": 0.0, "flops": 0.0}
    stop = time.monotonic() + seconds
    began, steps = 0.0, 0
    for number, step in enumerate(batches_of(rows, size)):
        if number == _WARM_UP:
            _settle()
            began = time.monotonic()
        if number > _WARM_UP and time.monotonic() > stop:
            break
        learnt = sum(label != IGNORED for batch in step for row in batch for label in row["labels"][1:])
        for packed in step:
            batch = {name: tensor.to(device) for name, tensor in collated(packed).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**batch, num_items_in_batch=learnt).loss
            loss.backward()
            if number >= _WARM_UP:
                counts["positions"] += batch["input_ids"].numel()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number >= _WARM_UP:
            lengths = [
                length for batch in step for row in batch for length in row.get("seq_lengths", [_length(row)])
            ]
            counts["tokens"] += sum(lengths)
            counts["learnt"] += learnt
            counts["flops"] += _flops(model, lengths)
            steps += 1
    _settle()
    passed = time.monotonic() - began
    per_second = {name: count / passed for name, count in counts.items()}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return per_second | {
        "batch": size,
        "steps": steps,
        "filled": counts["tokens"] / counts["positions"],
        "peak": peak,
        "seconds": passed,
    }


def _settle() -> None:
    """What was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _flops(model: Any, lengths: list[int]) -> float:
    """Of one pass forward and one back over rows of these lengths."""
    config = model.config
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    matrices = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    attention = 6 * config.num_hidden_layers * config.hidden_size
    return float(sum(4 * matrices * length + attention * length**2 for length in lengths))


if __name__ == "__main__":
    main()
