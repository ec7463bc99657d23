"""Events of a run: one JSON object per line in the run's events.jsonl.

The last event says how the run ended. A file without an end event belongs to a run that is running or was killed. This
module must not import torch.
"""

from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

EVENTS_FILE = "events.jsonl"


class _Event(BaseModel):
    # A loss can be NaN or infinite, which plain JSON cannot express.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Started(_Event):
    """The run started."""

    event: Literal["started"] = "started"
    run_id: str
    stage: str
    name: str


class Progress(_Event):
    """Training progressed."""

    event: Literal["progress"] = "progress"
    step: int
    max_steps: int
    eta_seconds: float
    metrics: dict[str, float]
    """`loss` and the other metrics of the stage, over the steps since the last progress event."""


class Evaluation(_Event):
    """The evaluation rows were scored."""

    event: Literal["evaluation"] = "evaluation"
    step: int
    metrics: dict[str, float]


class Checkpoint(_Event):
    """Trainer state was saved in the run's folder."""

    event: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str
    """Relative to the run's folder."""


class Published(_Event):
    """The result was published."""

    event: Literal["published"] = "published"
    ref: str
    """`name@revision` of an adapter, or `models/name` of a base model."""
    alias: str | None = None


class Succeeded(_Event):
    """The run succeeded."""

    event: Literal["succeeded"] = "succeeded"


class Failed(_Event):
    """The run failed with an error."""

    event: Literal["failed"] = "failed"
    error: str
    traceback: str


class Cancelled(_Event):
    """The user interrupted the run."""

    event: Literal["cancelled"] = "cancelled"


class Stopped(_Event):
    """The run stopped on request, at a checkpoint from which it can be resumed."""

    event: Literal["stopped"] = "stopped"
    step: int


class Resumed(_Event):
    """The run continues from its last checkpoint, or from the start if it had none."""

    event: Literal["resumed"] = "resumed"
    step: int


Event = Annotated[
    Started
    | Resumed
    | Progress
    | Evaluation
    | Checkpoint
    | Published
    | Succeeded
    | Failed
    | Cancelled
    | Stopped,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class EventLog:
    """Appends events to a file; `write` flushes each one before it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: Event) -> None:
        """Append one event."""
        self._file.write(event.model_dump_json() + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Drop a line that a kill left incomplete; the next event would be appended to it."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_events(path: Path) -> list[Event]:
    """Return all events in order. Ignores an incomplete last line, from a crash or a write in progress.

    Raises ValueError that names any other line that is not an event.
    """
    events: list[Event] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: empty or incomplete
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: not an event: {line[:80]!r}") from error
    return events
