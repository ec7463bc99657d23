"""Kahneman-Tversky optimisation: answers marked good or bad in, an adapter that gives good ones out.

Pairs of answers are taken too: the chosen one is good, the rejected one bad.
"""

from pathlib import Path

from trl import KTOConfig as TrlConfig
from trl import KTOTrainer

from training.config import KtoConfig
from training.data import read_documents, read_feedback, report
from training.lora import find_base, trainable
from training.preferences import dataset, prompts_of
from training.product import write_result
from training.run import Run
from training.trainer import arguments, fit, prepare


def run(config: KtoConfig, run: Run) -> Path:
    """Train the adapter; returns a folder ready to be published.

    Raises ConfigError (base or policy cannot be had), DataError, AdapterError (not a base model), Stopped.
    """
    prepare(config)
    train_rows = read_feedback(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_feedback(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    base = find_base(config, run.store)
    trainer = KTOTrainer(
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=config.max_length,
            beta=config.beta,
            # Good and bad answers weigh alike, however many there are of each (arXiv:2402.01306, eq. 8).
            **_weights(train_rows),
        ),
        train_dataset=dataset(train_rows, base.tokenizer, config.max_length),
        eval_dataset=dataset(evaluation_rows, base.tokenizer, config.max_length) if evaluation_rows else None,
        processing_class=base.tokenizer,
        **trainable(config, base, run.store),
    )
    metrics = fit(trainer, config, run, general_rows)
    rows = prompts_of(evaluation_rows or train_rows)
    return write_result(trainer.model, base, config, run, rows=rows, metrics=metrics)


def _weights(rows: list[dict[str, object]]) -> dict[str, float]:
    good = sum(bool(row["label"]) for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        return {}
    return {"desirable_weight": max(1.0, bad / good), "undesirable_weight": max(1.0, good / bad)}
