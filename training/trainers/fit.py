"""What all stages built on a Hugging Face trainer share: its arguments, its life, its end."""

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
"""Share of the steps in which the learning rate rises to its peak."""


def prepare(config: JobConfig) -> None:
    """Fix what is random; before any weight is drawn."""
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)


def arguments(config: OfflineJob | GrpoConfig, run: Run) -> dict[str, Any]:
    """Settings of transformers.TrainingArguments that follow from a job, whatever its stage."""
    on_gpu = torch.cuda.is_available()
    passes = config if isinstance(config, OfflineJob) else None
    evaluate_every = passes.evaluate_every if passes else None
    keep_best = passes is not None and passes.early_stop is not None
    asked = config.gradient_checkpointing
    return {
        "output_dir": str(run.folder / CHECKPOINTS),
        "use_cpu": not on_gpu,
        # TRL turns both on by default; on a CPU the one is slow and the other seldom needed.
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
        "restore_callback_states_from_checkpoint": keep_best,  # how long early_stop has been patient
        "metric_for_best_model": "eval_loss" if keep_best else None,
        "report_to": "none",  # events and boards come by a callback
        "ddp_find_unused_parameters": False,  # every weight that learns is used in every step
        "disable_tqdm": True,
    }


def fit(trainer: Trainer, config: AdapterJob, run: Run, general_rows: Sequence[Row] = ()) -> dict[str, float]:
    """Train, from the last checkpoint if there is one; returns what was measured before and after.

    `general_rows` are those of `general_files`. Raises Stopped if told to stop, with a checkpoint written.
    """
    if config.quantization:
        # TRL makes them bfloat16, which swallows small steps; PEFT would make them float32 again on resuming.
        for weight in (weight for weight in trainer.model.parameters() if weight.requires_grad):
            weight.data = weight.data.float()
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dictionary
    stopping = _Stopping(run.stop)
    trainer.add_callback(stopping)
    patience = config.early_stop if isinstance(config, OfflineJob) else None
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    steps = _steps(trainer)
    # Rounded down: a run of a few steps must not spend all of them at a learning rate of zero.
    trainer.args.warmup_steps = int(_WARMUP * steps)
    metrics: dict[str, float] = {}
    with ExitStack() as ending:
        ending.enter_context(run.stop.listening())
        boards = ending.enter_context(Boards(config, run))
        if processes.leads():
            trainer.add_callback(EventCallback(config.name, run.events, boards))
        forgetting = Forgetting(general_rows, trainer.processing_class, config, run, boards)
        # Not by `evaluate` here: a model that has been evaluated is never wrapped, and each process would train alone.
        trainer.args.eval_on_start = trainer.eval_dataset is not None and run.measured_before() is None
        trainer.add_callback(_SameDraws())
        trainer.add_callback(_WholeLogs())
        trainer.add_callback(_Before(forgetting))
        checkpoint = run.last_checkpoint()
        if checkpoint is not None:
            trainer.add_callback(_Restoring(checkpoint))
            if _is_over(checkpoint, steps, patience):
                trainer._run_epoch = lambda **_: None  # of which the trainer would begin another one
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
                    "%s: eval_loss %.3f, %.3f before", config.name, metrics["eval_loss"], before["eval_loss"]
                )
        metrics |= forgetting.after(trainer.model, trainer.state.global_step)
    return metrics


def _steps(trainer: Trainer) -> int:
    """How many steps a run will take."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    batches = len(trainer.get_train_dataloader())
    in_epoch = math.ceil(batches / trainer.args.gradient_accumulation_steps)
    return math.ceil(trainer.args.num_train_epochs * in_epoch)


def _is_over(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Was training at its end at this checkpoint, by its steps or by `early_stop`?"""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if patience is None:
        return state.global_step >= steps
    waited = state.stateful_callbacks[EarlyStoppingCallback.__name__]["attributes"][
        "early_stopping_patience_counter"
    ]
    return state.global_step >= steps or waited >= patience


def _mean_loss(state: TrainerState) -> float:
    """Over all steps. The trainer's own leaves out those before a resume, and is 0 where none were left to do."""
    total, before = 0.0, 0
    for log in state.log_history:
        if "loss" in log:  # the mean since the log before
            total += log["loss"] * (log["step"] - before)
            before = log["step"]
    return total / before


def _measures(metrics: dict[str, float]) -> dict[str, float]:
    """What says how good the model is, and not how fast the machine."""
    noise = re.compile(r"runtime|_per_second|epoch|num_tokens|_time|entropy|logits|logps")
    return {name: value for name, value in metrics.items() if not noise.search(name)}


class _Restoring(TrainerCallback):
    """Loads the adapter of a checkpoint that holds another beside it, such as a frozen copy as the reference.

    The trainer then loads only those in subfolders, and would begin anew with the one that learns.
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
                raise RuntimeError(f"the checkpoint holds another adapter: {loaded.unexpected_keys[:3]}")


class _WholeLogs(TrainerCallback):
    """Logs with each checkpoint, so that the loss of no step is lost to a run that is resumed from it."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log = control.should_log or control.should_save


class _SameDraws(TrainerCallback):
    """Random numbers go on after the evaluation before the first step as in a resumed run, which has none."""

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
    """Measures rows of general ability before the first step, once the trainer has put the model in its place.

    After the evaluation rows: theirs is the first evaluation of a run.
    """

    def __init__(self, forgetting: Forgetting) -> None:
        self._forgetting = forgetting

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._forgetting.before(kwargs["model"])


class _Stopping(TrainerCallback):
    """Ends training at the next step, with a checkpoint, when somebody asks: all processes at the same one."""

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
