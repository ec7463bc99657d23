"""Training with a Hugging Face trainer, for all stages that use one: arguments, training loop, final metrics."""

import logging
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from training.config import AdapterJob, GrpoConfig, JobConfig, OfflineJob
from training.data import Row
from training.runs import processes
from training.runs.events import Stopped as StoppedEvent
from training.runs.run import CHECKPOINTS, Run
from training.runs.stop import Stop, Stopped
from training.trainers.callback import EventCallback
from training.trainers.forgetting import Forgetting
from training.trainers.trackers import Boards

log = logging.getLogger(__name__)

_WARMUP = 0.03
"""Share of the steps that warm up the learning rate."""


def prepare(config: JobConfig) -> None:
    """Set threads and the random seed. Call it before any weight is drawn."""
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)


def arguments(config: OfflineJob | GrpoConfig, run: Run) -> dict[str, Any]:
    """Return the settings of transformers.TrainingArguments that all stages derive from a job."""
    on_gpu = torch.cuda.is_available()
    passes = config if isinstance(config, OfflineJob) else None
    evaluate_every = passes.evaluate_every if passes else None
    keep_best = passes is not None and passes.early_stop is not None
    asked = config.gradient_checkpointing
    return {
        "output_dir": str(run.folder / CHECKPOINTS),
        "use_cpu": not on_gpu,
        # TRL enables both by default; on a CPU bf16 is slow and checkpointing rarely needed.
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": on_gpu if asked is None else asked,
        "gradient_accumulation_steps": passes.gradient_accumulation_steps if passes else 1,
        "dataloader_pin_memory": on_gpu,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": evaluate_every if keep_best else config.checkpoint_every or 0.25,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluate_every else "no",
        "eval_steps": evaluate_every,
        "load_best_model_at_end": keep_best,
        "restore_callback_states_from_checkpoint": keep_best,  # the patience counter of early_stop
        "metric_for_best_model": "eval_loss" if keep_best else None,
        "report_to": "none",  # EventCallback writes events and boards
        "ddp_find_unused_parameters": False,  # every trainable weight is used in every step
        "disable_tqdm": True,
    }


def fit(trainer: Trainer, config: AdapterJob, run: Run, general_rows: Sequence[Row] = ()) -> dict[str, float]:
    """Train, from the last checkpoint if there is one; return the metrics before and after.

    `general_rows` are the rows of `general_files`. Raises Stopped on a stop request, after writing a checkpoint.
    """
    if config.quantization:
        # TRL casts them to bfloat16, which loses small updates; PEFT would cast them back to float32 on resume.
        for weight in (weight for weight in trainer.model.parameters() if weight.requires_grad):
            weight.data = weight.data.float()
    trainer.remove_callback(PrinterCallback)  # it prints each log as a dictionary
    stopping = _Stopping(run.stop)
    trainer.add_callback(stopping)
    patience = config.early_stop if isinstance(config, OfflineJob) else None
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    steps = _steps(trainer)
    # Rounded down, so that a run of a few steps does not spend all of them at a learning rate of zero.
    trainer.args.warmup_steps = int(_WARMUP * steps)
    metrics: dict[str, float] = {}
    with ExitStack() as ending:
        ending.enter_context(run.stop.listening())
        boards = ending.enter_context(Boards(config, run))
        if processes.leads():
            trainer.add_callback(EventCallback(config.name, run.events, boards))
        forgetting = Forgetting(general_rows, trainer.processing_class, config, run, boards)
        # Not by `evaluate` here: it keeps the trainer from wrapping the model, and each process would train alone.
        trainer.args.eval_on_start = trainer.eval_dataset is not None and run.measured_before() is None
        trainer.add_callback(_SameDraws())
        trainer.add_callback(_WholeLogs())
        trainer.add_callback(_Before(forgetting))
        checkpoint = run.last_checkpoint()
        if checkpoint is not None:
            trainer.add_callback(_Restoring(checkpoint))
            if _is_over(checkpoint, steps, patience):
                trainer._run_epoch = lambda **_: None  # the trainer would begin another epoch
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics["train_loss"] = _mean_loss(trainer.state)
        if stopping.is_agreed and trainer.state.global_step < trainer.state.max_steps:
            run.events.write(StoppedEvent(step=trainer.state.global_step))
            raise Stopped(f"step {trainer.state.global_step} of {trainer.state.max_steps}")
        if trainer.eval_dataset is not None:
            before = _measures(run.measured_before() or {})
            metrics |= {f"{name}_before": value for name, value in before.items()}
            metrics |= _measures(trainer.evaluate())
            if processes.leads() and "eval_loss" in before:
                log.info(
                    "%s: eval_loss %.3f, before training %.3f",
                    config.name,
                    metrics["eval_loss"],
                    before["eval_loss"],
                )
        metrics |= forgetting.after(trainer.model, trainer.state.global_step)
    return metrics


def _steps(trainer: Trainer) -> int:
    """Return the number of steps of the run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    batches = len(trainer.get_train_dataloader())
    in_epoch = math.ceil(batches / trainer.args.gradient_accumulation_steps)
    return math.ceil(trainer.args.num_train_epochs * in_epoch)


def _is_over(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Return whether training had ended at this checkpoint, by its steps or by `early_stop`."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if patience is None:
        return state.global_step >= steps
    waited = state.stateful_callbacks[EarlyStoppingCallback.__name__]["attributes"][
        "early_stopping_patience_counter"
    ]
    return state.global_step >= steps or waited >= patience


def _mean_loss(state: TrainerState) -> float:
    """Return the mean loss of all steps. The trainer's own omits steps before a resume, and is 0 if none were left."""
    total, before = 0.0, 0
    for log in state.log_history:
        if "loss" in log:  # the mean since the previous log
            total += log["loss"] * (log["step"] - before)
            before = log["step"]
    return total / before


def _measures(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of the model, without those of the machine's speed."""
    noise = re.compile(r"runtime|_per_second|epoch|num_tokens|_time|entropy|logits|logps")
    return {name: value for name, value in metrics.items() if not noise.search(name)}


class _Restoring(TrainerCallback):
    """Loads the trained adapter of a checkpoint that also holds another, such as the reference model.

    The trainer would load only the adapters in subfolders, and restart the trained one from its beginning.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if any(self._checkpoint.glob("*/adapter_config.json")):
            tensors = load_file(self._checkpoint / "adapter_model.safetensors")
            loaded = set_peft_model_state_dict(kwargs["model"], tensors, adapter_name="default")
            if loaded.unexpected_keys:
                raise RuntimeError(
                    f"the checkpoint holds tensors of another adapter: {loaded.unexpected_keys[:3]}"
                )


class _WholeLogs(TrainerCallback):
    """Logs at each checkpoint, so that a run resumed from it knows the loss of every step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log = control.should_log or control.should_save


class _SameDraws(TrainerCallback):
    """Restores the random state after the evaluation at step 0, as a resumed run does not have that evaluation."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._draws = torch.get_rng_state()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            torch.set_rng_state(self._draws)


class _Before(TrainerCallback):
    """Measures the rows of `general_files` before the first step, after the trainer has moved and wrapped the model.

    It runs after the evaluation rows, whose evaluation is the first of a run.
    """

    def __init__(self, forgetting: Forgetting) -> None:
        self._forgetting = forgetting

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._forgetting.before(kwargs["model"])


class _Stopping(TrainerCallback):
    """Ends training after the current step with a checkpoint on a stop request, in all processes at the same step."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self.is_agreed = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_agreed = processes.any_of(self._stop.is_asked)
        if self.is_agreed:
            control.should_save = True
            control.should_training_stop = True
