"""Reports a Hugging Face trainer's progress as events, on boards and on the terminal."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.runs.events import Checkpoint, Evaluation, EventLog, Progress
from training.runs.progress import Meter
from training.trainers.trackers import Boards


class EventCallback(TrainerCallback):
    """Writes one event for every log, evaluation and checkpoint of the trainer, and its numbers to `boards`.

    The trainer's own board callbacks would open a second board for an evaluation after training, and would not close
    one on failure.
    """

    def __init__(self, title: str, events: EventLog, boards: Boards) -> None:
        self._title = title
        self._events = events
        self._boards = boards
        self._meter: Meter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._meter = Meter(self._title, state.max_steps, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._meter is not None:
            self._meter.update(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = _numbers(logs)
        self._boards.write(state.global_step, metrics)
        if self._meter is not None and "loss" in metrics:  # not the log of an evaluation or the summary
            self._meter.update(state.global_step, metrics["loss"])
            eta_seconds = self._meter.eta_seconds()
            self._events.write(
                Progress(
                    step=state.global_step,
                    max_steps=state.max_steps,
                    eta_seconds=eta_seconds,
                    metrics=metrics,
                )
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._events.write(Evaluation(step=state.global_step, metrics=_numbers(metrics)))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = f"checkpoints/checkpoint-{state.global_step}"
        self._events.write(Checkpoint(step=state.global_step, folder=folder))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._meter is not None:
            self._meter.close()


def _numbers(metrics: dict[str, Any] | None) -> dict[str, float]:
    """Return the metrics of the model, without those of the machine's speed."""
    return {
        name: float(value)
        for name, value in (metrics or {}).items()
        if isinstance(value, int | float) and not name.endswith(("_runtime", "_time", "_per_second"))
    }
