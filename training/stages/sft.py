"""Supervised fine-tuning: trains a LoRA adapter on conversations."""

import logging
from pathlib import Path
from typing import Any

from trl import SFTConfig as TrlConfig

from training.artifacts.result import golden_rows, write_result
from training.config import OnError, SftConfig
from training.data import Row, read_chats, read_documents, report
from training.errors import ConfigError, DataError
from training.models.base_model import find_base
from training.models.lora import trainable
from training.runs.run import Run
from training.tokens import packing
from training.tokens.examples import Examples, Tokens, encoded
from training.tokens.loss_mask import Encoded, encode
from training.trainers.fit import arguments, fit, prepare
from training.trainers.supervised import SupervisedTrainer

log = logging.getLogger(__name__)


def train(config: SftConfig, run: Run) -> Path:
    """Train the adapter; return a folder ready to publish.

    Raises ConfigError (base model or adapter not found, or packing is not exact on it), DataError, AdapterError (not
    a base model), Stopped.
    """
    prepare(config)
    train_rows = read_chats(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_chats(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    base = find_base(config, run.store)
    longest = base.longest(config)
    train = _examples(train_rows, base.tokenizer, longest, config.on_error)
    evaluation = _examples(evaluation_rows, base.tokenizer, longest, config.on_error)
    golden = golden_rows(evaluation.rows or train.rows, base, config)
    to_train = trainable(config, base, run.store)
    if config.packing:
        if not packing.is_exact(to_train["model"]):
            raise ConfigError(
                f"packing: the architecture of {base.name} cannot keep packed rows apart: remove `packing`"
            )
        train = Examples(train.rows, packing.pack(train.tokens, longest))
    trainer = SupervisedTrainer(
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=longest,
            train_sampling_strategy="group_by_length",  # of evaluation rows
            neftune_noise_alpha=config.neftune_noise_alpha,
        ),
        data_collator=packing.collate if config.packing else None,
        train_dataset=train.dataset(),
        eval_dataset=evaluation.dataset(),
        processing_class=base.tokenizer,
        **to_train,
    )
    metrics = fit(trainer, config, run, general_rows)
    return write_result(trainer.model, base, config, run, rows=golden, metrics=metrics)


def _examples(rows: list[Row], tokenizer: Any, max_length: int, on_error: OnError) -> Examples:
    """Return token ids, and labels on the assistant's words only; cut long rows."""
    cut = 0

    def encode_row(row: Row) -> Tokens:
        nonlocal cut
        found: Encoded = encode(tokenizer, row["messages"], max_length)
        cut += found.is_cut
        labels = [
            token if learnt else packing.IGNORED
            for token, learnt in zip(found.input_ids, found.loss_mask, strict=True)
        ]
        return {"input_ids": found.input_ids, "labels": labels}

    found = encoded(rows, on_error, encode_row)
    kept = [(row, tokens) for row, tokens in found if any(label >= 0 for label in tokens["labels"])]
    if cut:
        log.warning("cut %d of %d rows at max_length %d", cut, len(rows), max_length)
    if len(kept) < len(found):
        log.warning(
            "skipped %d of %d rows: max_length cuts off the whole answer",
            len(found) - len(kept),
            len(rows),
        )
    if rows and not kept:
        raise DataError(f"no row has an answer within max_length {max_length}: raise max_length")
    return Examples([row for row, _ in kept], [tokens for _, tokens in kept])
