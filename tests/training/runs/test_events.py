import math
from pathlib import Path

import pytest

from training.runs.events import (
    Cancelled,
    Checkpoint,
    Evaluation,
    Event,
    EventLog,
    Failed,
    Progress,
    Published,
    Resumed,
    Started,
    Stopped,
    Succeeded,
    read_events,
)

EVERY: list[Event] = [
    Started(run_id="r", stage="sft", name="doctor"),
    Progress(step=1, max_steps=2, eta_seconds=0.5, metrics={"loss": 1.5}),
    Evaluation(step=1, metrics={"eval_loss": 1.0}),
    Checkpoint(step=1, folder="checkpoints/checkpoint-1"),
    Published(ref="doctor@0123456789ab", alias="default"),
    Succeeded(),
    Failed(error="ValueError: 坏了", traceback="…"),
    Cancelled(),
    Resumed(step=1),
    Stopped(step=2),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for event in EVERY:
            log.write(event)
    return path


def test_events_round_trip(path: Path) -> None:
    assert read_events(path) == EVERY


def test_an_event_is_readable_at_once(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.jsonl") as log:
        log.write(EVERY[0])
        assert read_events(tmp_path / "e.jsonl") == EVERY[:1]


def test_an_incomplete_last_line_is_ignored(path: Path) -> None:
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for lost in range(1, last + 1):
        path.write_bytes(whole[:-lost])
        assert read_events(path) == EVERY[:-1]


def test_any_other_bad_line_is_an_error(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[2] = '{"event": "party"}'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"events\.jsonl:3: not an event"):
        read_events(path)


def test_a_loss_that_is_not_finite_round_trips(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.jsonl") as log:
        log.write(Progress(step=1, max_steps=2, eta_seconds=0, metrics={"a": math.nan, "b": math.inf}))
    (event,) = read_events(tmp_path / "e.jsonl")
    assert isinstance(event, Progress)
    assert math.isnan(event.metrics["a"])
    assert event.metrics["b"] == math.inf


def test_an_event_after_an_incomplete_line_is_read(path: Path) -> None:
    """A run resumed after a kill appends to the same file."""
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for lost in range(1, last + 1):
        path.write_bytes(whole[:-lost])
        with EventLog(path) as log:
            log.write(EVERY[0])
        assert read_events(path) == [*EVERY[:-1], EVERY[0]]


def test_opening_a_log_again_loses_nothing(path: Path) -> None:
    with EventLog(path) as log:
        log.write(EVERY[0])
    assert read_events(path) == [*EVERY, EVERY[0]]
