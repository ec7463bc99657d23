"""Reward modelling: trains an adapter with a score head to rank the chosen answer of each pair higher.

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
    """Train the adapter; return a folder ready to publish.

    Raises ConfigError (base model not found), DataError, AdapterError (not a base model), Stopped.
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
    """Measures accuracy over all pairs; TRL averages over batches, so a small last batch skews it."""

    _pairs, _right = 0, 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not self.model.training:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            right = self.accelerator.gather_for_metrics(
                chosen > rejected
            )  # from all processes, each pair once
            self._pairs += len(right)
            self._right += int(right.sum())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._pairs and not self.model.training:
            self._metrics["eval"]["accuracy"] = [self._right / self._pairs]
            self._pairs, self._right = 0, 0
        super().log(logs, start_time)
