"""Kahneman-Tversky optimisation: trains an adapter on answers labelled good or bad.

It also takes pairs of answers: the chosen one is good, the rejected one bad.
"""

from pathlib import Path
from typing import Any

from trl import KTOConfig as TrlConfig
from trl import KTOTrainer

from training.artifacts.result import golden_rows, write_result
from training.config import KtoConfig
from training.data import read_documents, read_feedback, report
from training.models.base_model import find_base
from training.models.golden import prompts_of
from training.models.lora import trainable
from training.runs.run import Run
from training.tokens.examples import feedback
from training.trainers.fit import arguments, fit, prepare


def train(config: KtoConfig, run: Run) -> Path:
    """Train the adapter; return a folder ready to publish.

    Raises ConfigError (base model or policy not found), DataError, AdapterError (not a base model), Stopped.
    """
    prepare(config)
    train_rows = read_feedback(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_feedback(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    base = find_base(config, run.store)
    longest = base.longest(config)
    train = feedback(train_rows, base.tokenizer, longest, config.on_error)
    evaluation = feedback(evaluation_rows, base.tokenizer, longest, config.on_error)
    golden = golden_rows(prompts_of(evaluation.rows or train.rows), base, config)
    trainer = _Trainer(
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=longest,
            beta=config.beta,
            # Good and bad answers have the same total weight, whatever their numbers (arXiv:2402.01306, eq. 8).
            **_weights(train_rows),
        ),
        train_dataset=train.dataset(),
        eval_dataset=evaluation.dataset(),
        processing_class=base.tokenizer,
        **trainable(config, base, run.store),
    )
    metrics = fit(trainer, config, run, general_rows)
    return write_result(trainer.model, base, config, run, rows=golden, metrics=metrics)


def _weights(rows: list[dict[str, object]]) -> dict[str, float]:
    good = sum(bool(row["label"]) for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        return {}
    return {"desirable_weight": max(1.0, bad / good), "undesirable_weight": max(1.0, good / bad)}


class _Trainer(KTOTrainer):
    """Accepts rows that are already token ids."""

    def _prepare_dataset(self, dataset: Any, _tokenizer: Any, args: Any, _name: str) -> Any:
        """Add the answers of each batch shifted by one row, from which TRL estimates the KL term."""
        if not self.calculate_KL:
            return dataset

        def turn(batch: Any) -> Any:
            answers = batch["completion_ids"]
            return {**batch, "KL_completion_ids": [answers[-1], *answers[:-1]]}

        return dataset.map(turn, batched=True, batch_size=args.per_device_train_batch_size)
