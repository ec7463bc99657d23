"""Continued pre-training: trains an adapter, or a new base model, on texts of a field."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from trl import SFTConfig as TrlConfig

from training.artifacts.result import golden_rows, write_base, write_result
from training.config import OnError, PtConfig
from training.data import Row, read_documents, report
from training.errors import ConfigError, DataError
from training.models.base_model import Base, find_base
from training.models.lora import lora_config, vocabulary_name
from training.runs.run import Run
from training.tokens import packing
from training.tokens.documents import encode_document, split
from training.tokens.examples import encoded
from training.tokens.vocabulary import Pieces, add_tokens, make_room
from training.trainers.fit import arguments, fit, prepare
from training.trainers.supervised import SupervisedTrainer

log = logging.getLogger(__name__)

_SENTENCE = re.compile(r"\s*(.+?(?:[。！？!?]|\.(?=\s|$)|\n|$))")
_MOST_OF_A_SENTENCE = 200


def train(config: PtConfig, run: Run) -> Path:
    """Train the adapter, or all weights; return a folder ready to publish.

    Raises ConfigError (base model not found or not suitable for the job), DataError, AdapterError (not a base
    model), Stopped.
    """
    prepare(config)
    train_rows = read_documents(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_documents(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    has_chats = any("messages" in row for row in (*train_rows, *evaluation_rows, *general_rows))
    base = find_base(config, run.store, must_chat=has_chats or not config.makes_base)
    pieces = add_tokens(base.tokenizer, config.new_tokens)
    longest = base.longest(config)
    examples = _examples(train_rows, base.tokenizer, longest, config.on_error)
    held_out = _examples(evaluation_rows, base.tokenizer, longest, config.on_error)
    golden = (
        []
        if config.makes_base
        else golden_rows(_questions(evaluation_rows or train_rows, config.golden.prompts), base, config)
    )
    to_train = _trainable(config, base, pieces)
    is_packed = _is_packed(config, to_train["model"])
    trainer = SupervisedTrainer(
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=longest,
            train_sampling_strategy="group_by_length",  # of evaluation rows
        ),
        data_collator=packing.collate if is_packed else None,
        train_dataset=Dataset.from_list(packing.pack(examples, longest) if is_packed else examples),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=base.tokenizer,
        **to_train,
    )
    metrics = fit(trainer, config, run, general_rows)
    if config.full:
        return write_base(trainer.model, base, config, run, metrics=metrics)
    return write_result(trainer.model, base, config, run, rows=golden, metrics=metrics)


def _trainable(config: PtConfig, base: Base, pieces: Pieces) -> dict[str, Any]:
    """Return `model` and `peft_config` for the trainer, with embeddings for the new tokens."""
    # With `full: true`, all weights in float32: bfloat16 would lose the small updates of continued pre-training.
    model = base.causal_lm(dtype=torch.float32 if config.full else None)
    if pieces:
        make_room(model, pieces)
    if config.full:
        return {"model": model}
    whole = [vocabulary_name(model, side) for side in ("input", "output")] if pieces else []
    return {"model": model, "peft_config": lora_config(config.lora, TaskType.CAUSAL_LM, model, whole)}


def _is_packed(config: PtConfig, model: Any) -> bool:
    if config.packing is False or packing.is_exact(model):
        return config.packing is not False
    if config.packing:
        raise ConfigError(
            "packing: the base model's architecture cannot keep packed rows apart: remove `packing`"
        )
    log.info("not packed: the base model's architecture cannot keep packed rows apart")
    return False


def _examples(rows: list[Row], tokenizer: Any, max_length: int, on_error: OnError) -> list[packing.Row]:
    """Return documents with their end token and a label on every token; split long ones into parts of equal length."""
    documents = encoded(rows, on_error, lambda row: {"input_ids": encode_document(row, tokenizer)})
    parts = [part for _, tokens in documents for part in split(tokens["input_ids"], max_length)]
    examples = [{"input_ids": part, "labels": list(part)} for part in parts if len(part) > 1]
    if rows and not examples:
        raise DataError("all documents are empty: give files with text")
    return examples


def _questions(rows: list[Row], count: int) -> list[Row]:
    """Return chats for golden prompts: the rows that are chats, and one per document in which the user says its first
    sentence; if these are fewer than `count`, also the other sentences.
    """
    documents = [list(_sentences(row["text"])) for row in rows if "text" in row]
    chats = [row for row in rows if "messages" in row]
    first = chats + [_asked(sentence) for document in documents for sentence in document[:1]]
    if len(first) >= count:
        return first
    return first + [_asked(sentence) for document in documents for sentence in document[1:]]


def _sentences(text: str) -> Iterator[str]:
    for found in _SENTENCE.finditer(text):
        yield found[1].strip()[:_MOST_OF_A_SENTENCE]


def _asked(text: str) -> Row:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]}
