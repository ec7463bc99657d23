"""Supervised fine-tuning: conversations and a base model in, a LoRA adapter with its proof out."""

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig as TrlConfig

from training import packing
from training.config import ConfigError, SftConfig
from training.data import DataError, Row, read_chats, read_documents, report
from training.lora import find_base, trainable
from training.masks import encode
from training.product import write_result
from training.run import Run
from training.supervised import SupervisedTrainer
from training.trainer import arguments, fit, prepare

log = logging.getLogger(__name__)


def run(config: SftConfig, run: Run) -> Path:
    """Train the adapter; returns a folder ready to be published.

    Raises ConfigError (base or adapter cannot be had, or packing is not exact on it), DataError, AdapterError (not
    a base model), Stopped.
    """
    prepare(config)
    train_rows = read_chats(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_chats(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    base = find_base(config, run.store)
    examples = _examples(train_rows, base.tokenizer, config.max_length)
    held_out = _examples(evaluation_rows, base.tokenizer, config.max_length) if evaluation_rows else None
    to_train = trainable(config, base, run.store)
    if config.packing:
        if not packing.is_exact(to_train["model"]):
            raise ConfigError(
                f"packing: {base.name} is of an architecture that cannot keep packed rows apart: leave it out"
            )
        examples = packing.pack(examples, config.max_length)
    trainer = SupervisedTrainer(
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=config.max_length,
            train_sampling_strategy="group_by_length",  # of evaluation rows
            neftune_noise_alpha=config.neftune_noise_alpha,
        ),
        data_collator=packing.collate if config.packing else None,
        train_dataset=Dataset.from_list(examples),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=base.tokenizer,
        **to_train,
    )
    metrics = fit(trainer, config, run, general_rows)
    rows = evaluation_rows or train_rows
    return write_result(trainer.model, base, config, run, rows=rows, metrics=metrics)


def _examples(rows: list[Row], tokenizer: Any, max_length: int) -> list[packing.Row]:
    """Token ids, and labels that leave out all but the assistant's words."""
    encoded = [encode(tokenizer, row["messages"], max_length) for row in rows]
    learnable = [one for one in encoded if any(one.loss_mask)]
    if cut := sum(one.is_cut for one in encoded):
        log.warning("%d of %d rows are longer than max_length %d and are cut", cut, len(rows), max_length)
    if left_out := len(encoded) - len(learnable):
        log.warning("of %d of %d rows no answer is left to learn, and they are left out", left_out, len(rows))
    if not learnable:
        raise DataError(f"no row has an answer within max_length {max_length}: raise it")
    return [
        {
            "input_ids": one.input_ids,
            "labels": [
                token if learnt else packing.IGNORED
                for token, learnt in zip(one.input_ids, one.loss_mask, strict=True)
            ],
        }
        for one in learnable
    ]
