"""Trains a tokenizer and a small base model from scratch on documents and chats.

Small on purpose: within a minute on a CPU, the model knows one corpus by heart. The most important choices at that
size, in order: whole documents in batches of similar length instead of packed blocks; tokens of at most a few
characters; a large initial scale; many small steps.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from training.config import BaseModelSize, ScratchConfig
from training.data import Row, read_documents
from training.runs.events import Progress
from training.runs.progress import Meter
from training.runs.run import Run
from training.templates import CHAT_TEMPLATE
from training.trainers.fit import prepare
from training.trainers.trackers import Boards

_END_OF_TEXT, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_MAX_TOKEN_LENGTH = 12  # bytes: four Han characters; longer ones would be whole phrases of the corpus
_BATCHES_IN_BUCKET = 8
_STEPS_BETWEEN_EVENTS = 10
_IGNORED = -100  # transformers excludes this label from the loss


def train(config: ScratchConfig, run: Run) -> Path:
    """Train tokenizer and model; return the folder with both, ready for any Hugging Face loader.

    Raises DataError for files that cannot be read.
    """
    prepare(config)
    rows = read_documents(config.train_files, config.on_error, config.seed)
    tokenizer = _train_tokenizer(rows, config.model.vocab_size)
    documents = [_encode(tokenizer, row, config.model.max_position_embeddings) for row in rows]
    model = _build_model(config.model, tokenizer)
    loss = _train(model, documents, config, run)
    run.events.write(
        Progress(step=config.steps, max_steps=config.steps, eta_seconds=0.0, metrics={"loss": loss})
    )

    result = run.folder / "result"
    model.save_pretrained(result)
    tokenizer.save_pretrained(result)
    return result


def _train_tokenizer(rows: list[Row], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE over runs of Han characters, words, single digits and punctuation."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{Han}+| ?[A-Za-z]+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT, _TURN_START, _TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        max_token_length=_MAX_TOKEN_LENGTH,
        show_progress=False,
    )
    texts = (
        text for row in rows for text in ([row["text"]] if "text" in row else _contents(row["messages"]))
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token=_TURN_END,
        pad_token=_END_OF_TEXT,
        additional_special_tokens=[_TURN_START],
        clean_up_tokenization_spaces=False,
    )


def _contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def _encode(tokenizer: PreTrainedTokenizerFast, row: Row, max_length: int) -> list[int]:
    if "text" in row:
        return [*tokenizer(row["text"]).input_ids, tokenizer.pad_token_id][:max_length]
    return tokenizer.apply_chat_template(row["messages"], return_dict=False)[:max_length]


def _build_model(size: BaseModelSize, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **size.model_dump(),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=stop,
            pad_token_id=pad,
            dtype="float32",
        )
    )
    # Servers read the stop token from generation_config.json.
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=pad)
    return model


def _train(model: Qwen3ForCausalLM, documents: list[list[int]], config: ScratchConfig, run: Run) -> float:
    """Train, and return the final loss in nats per token, averaged over the last steps."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step / config.steps))
    batches = _batches(documents, config.batch_size, config.seed)
    meter = Meter(config.name, config.steps)
    loss_now = 0.0
    model.train()
    with Boards(config, run) as boards:
        for step in range(1, config.steps + 1):
            loss = model(**next(batches)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_now = loss.item() if step == 1 else 0.9 * loss_now + 0.1 * loss.item()
            meter.update(step, loss_now)
            if step % _STEPS_BETWEEN_EVENTS == 0:
                metrics = {"loss": loss_now, "learning_rate": schedule.get_last_lr()[0]}
                run.events.write(
                    Progress(
                        step=step, max_steps=config.steps, eta_seconds=meter.eta_seconds(), metrics=metrics
                    )
                )
                boards.write(step, metrics)
            schedule.step()
    meter.close()
    model.eval()
    return loss_now


def _learning_rate(done: float) -> float:
    """Return the share of the peak rate: linear warm-up over 4 % of the run, then a cosine down to 5 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return min(1.0, done / 0.04 + 0.02) * (0.05 + 0.95 * cosine)


def _batches(documents: list[list[int]], size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield padded batches without end. Documents of similar length share one, which needs little padding; no
    document is cut or joined with another."""
    chance = random.Random(seed)  # noqa: S311
    while True:
        order = chance.sample(documents, len(documents))
        batches = []
        bucket = size * _BATCHES_IN_BUCKET
        for start in range(0, len(order), bucket):
            alike = sorted(order[start : start + bucket], key=len)
            batches += [alike[at : at + size] for at in range(0, len(alike), size)]
        chance.shuffle(batches)
        for batch in batches:
            yield _pad(batch)


def _pad(batch: list[list[int]]) -> dict[str, Any]:
    shape = len(batch), max(map(len, batch))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, _IGNORED, dtype=torch.long)
    for row, document in enumerate(batch):
        input_ids[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document)
        attention_mask[row, : len(document)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
