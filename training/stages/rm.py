"""Reward modelling: pairs of answers in, an adapter with a score head that tells the better from the worse.

The reward of a conversation is read at the last token of its rendering by the chat template.
"""

from pathlib import Path
from typing import Any

from peft import TaskType
from trl import RewardConfig as TrlConfig
from trl import RewardTrainer

from training.artifacts.result import write_reward_adapter
from training.config import RmConfig
from training.data import read_preferences, report
from training.models.base_model import find_base
from training.models.lora import lora_config
from training.runs.run import Run
from training.tokens.examples import conversations
from training.trainers.fit import arguments, fit, prepare


def train(config: RmConfig, run: Run) -> Path:
    """Train the adapter; returns a folder ready to be published.

    Raises ConfigError (the base cannot be had), DataError, AdapterError (not a base model), Stopped.
    """
    prepare(config)
    train_rows = read_preferences(config.train_files, config.on_error, config.seed)
    evaluation_rows = read_preferences(config.evaluation_files, config.on_error)
    report(train_rows, evaluation_rows).log()
    base = find_base(config, run.store)
    longest = base.longest(config)
    model = base.scorer()
    trainer = _Trainer(
        model=model,
        args=TrlConfig(
            **arguments(config, run),
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            max_length=longest,
            center_rewards_coefficient=config.center_rewards,
        ),
        train_dataset=conversations(train_rows, base.tokenizer, longest, config.on_error).dataset(),
        eval_dataset=conversations(evaluation_rows, base.tokenizer, longest, config.on_error).dataset(),
        processing_class=base.tokenizer,
        peft_config=lora_config(config.lora, TaskType.SEQ_CLS, model, ["score"]),
    )
    metrics = fit(trainer, config, run)
    return write_reward_adapter(trainer.model, base, config, run, metrics=metrics)


class _Trainer(RewardTrainer):
    """Counts pairs that are ranked rightly, where TRL averages over batches, so that a small last one skews."""

    _pairs, _right = 0, 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not self.model.training:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            right = self.accelerator.gather_for_metrics(chosen > rejected)  # of all processes, each pair once
            self._pairs += len(right)
            self._right += int(right.sum())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._pairs and not self.model.training:
            self._metrics["eval"]["accuracy"] = [self._right / self._pairs]
            self._pairs, self._right = 0, 0
        super().log(logs, start_time)
