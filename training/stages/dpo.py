"""Direct preference optimisation: trains an adapter to prefer the chosen answer of each pair."""

from pathlib import Path
from typing import Any

from trl import DPOConfig as TrlConfig
from trl import DPOTrainer

from training.artifacts.result import golden_rows, write_result
from training.config import DpoConfig
from training.data import read_documents, read_preferences, report
from training.models.base_model import find_base
from training.models.golden import prompts_of
from training.models.lora import trainable
from training.runs.run import Run
from training.tokens.examples import pairs
from training.trainers.fit import arguments, fit, prepare


def train(config: DpoConfig, run: Run) -> Path:
    """Train the adapter; return a folder ready to publish.

    Raises ConfigError (base model or policy not found), DataError, AdapterError (not a base model), Stopped.
    """
    prepare(config)
    train_rows = read_preferences(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_preferences(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    base = find_base(config, run.store)
    longest = base.longest(config)
    train = pairs(train_rows, base.tokenizer, longest, config.on_error)
    evaluation = pairs(evaluation_rows, base.tokenizer, longest, config.on_error)
    golden = golden_rows(prompts_of(evaluation.rows or train.rows), base, config)
    trainer = _Trainer(
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=longest,
            beta=config.beta,
        ),
        train_dataset=train.dataset(),
        eval_dataset=evaluation.dataset(),
        processing_class=base.tokenizer,
        **trainable(config, base, run.store),
    )
    metrics = fit(trainer, config, run, general_rows)
    return write_result(trainer.model, base, config, run, rows=golden, metrics=metrics)


class _Trainer(DPOTrainer):
    """Accepts rows that are already token ids."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset
