"""Direct preference optimisation: pairs of answers in, an adapter that prefers the better ones out."""

from pathlib import Path

from trl import DPOConfig as TrlConfig
from trl import DPOTrainer

from training.config import DpoConfig
from training.data import read_documents, read_preferences, report
from training.lora import find_base, trainable
from training.preferences import dataset, prompts_of
from training.product import write_result
from training.run import Run
from training.trainer import arguments, fit, prepare


def run(config: DpoConfig, run: Run) -> Path:
    """Train the adapter; returns a folder ready to be published.

    Raises ConfigError (base or policy cannot be had), DataError, AdapterError (not a base model), Stopped.
    """
    prepare(config)
    train_rows = read_preferences(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_preferences(config.evaluation_files, config.on_error)
    general_rows = read_documents(config.general_files, config.on_error)
    report(train_rows, evaluation_rows, general_rows).log()
    base = find_base(config, run.store)
    trainer = DPOTrainer(
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=config.max_length,
            beta=config.beta,
        ),
        train_dataset=dataset(train_rows, base.tokenizer, config.max_length),
        eval_dataset=dataset(evaluation_rows, base.tokenizer, config.max_length) if evaluation_rows else None,
        processing_class=base.tokenizer,
        **trainable(config, base, run.store),
    )
    metrics = fit(trainer, config, run, general_rows)
    rows = prompts_of(evaluation_rows or train_rows)
    return write_result(trainer.model, base, config, run, rows=rows, metrics=metrics)
