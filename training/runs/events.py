"""What happens in a run, as events: one JSON object a line in the run's events.jsonl.

The last line says how the run ended; a file without such an end belongs to a run that goes on, or that
was killed. Light on purpose: no torch here.
"""

from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

EVENTS_FILE = "events.jsonl"


class _Event(BaseModel):
    # A loss can be NaN or infinite, which plain JSON cannot say.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Started(_Event):
    """The run began."""

    event: Literal["started"] = "started"
    run_id: str
    stage: str
    name: str


class Progress(_Event):
    """Training went on."""

    event: Literal["progress"] = "progress"
    step: int
    max_steps: int
    eta_seconds: float
    metrics: dict[str, float]
    """`loss` and whatever else the stage measures, over the steps since the last such event."""


class Evaluation(_Event):
    """The evaluation rows were scored."""

    event: Literal["evaluation"] = "evaluation"
    step: int
    metrics: dict[str, float]


class Checkpoint(_Event):
    """Trainer state was saved inside the run."""

    event: Literal["checkpoint"] = "checkpoint"
    step: int
    folder: str
    """Relative to the run's folder."""


class Published(_Event):
    """What was made is where servers find it."""

    event: Literal["published"] = "published"
    ref: str
    """`name@revision` of an adapter, or `models/name` of a base model."""
    alias: str | None = None


class Succeeded(_Event):
    """The run ended well."""

    event: Literal["succeeded"] = "succeeded"


class Failed(_Event):
    """The run ended in an error."""

    event: Literal["failed"] = "failed"
    error: str
    traceback: str


class Cancelled(_Event):
    """The run was interrupted by its user."""

    event: Literal["cancelled"] = "cancelled"


class Stopped(_Event):
    """The run was told to stop and did so at a checkpoint, from which it can be resumed."""

    event: Literal["stopped"] = "stopped"
    step: int


class Resumed(_Event):
    """The run goes on: from its last checkpoint, or from the beginning if it had none."""

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
    """Appends events to a file; each is on its way to the disk before `write` returns."""

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
    """What a kill left half written must not swallow the next event."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_events(path: Path) -> list[Event]:
    """All events in order. A last line torn by a crash, or being written now, is left out.

    Raises ValueError naming any other line that is not an event.
    """
    events: list[Event] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError as error:
            raise ValueError(f"{path}:{number}: not an event: {line[:80]!r}") from error
    return events
