"""The training loop of all stages that use a Hugging Face trainer, tested with stage sft."""

from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterRef, AdapterStore
from tests.training.jobs import LoadJob, run_job
from training.runs.events import Checkpoint, Evaluation, Event, EventLog, Progress, read_events
from training.runs.events import Stopped as StoppedEvent
from training.runs.execute import begin, carry_out
from training.runs.stop import Stopped
from training.stages import sft


def events_of(data_dir: Path) -> list[Any]:
    (path,) = data_dir.glob("runs/*/events.jsonl")
    return read_events(path)


def losses(data_dir: Path) -> dict[int, float]:
    """Return the evaluation loss by step, the last one of each step."""
    evaluations = [event for event in events_of(data_dir) if isinstance(event, Evaluation)]
    return {event.step: event.metrics["eval_loss"] for event in evaluations}


def test_a_single_step_learns(load_sft: LoadJob, tmp_path: Path) -> None:
    """It is not spent on the warm-up at a learning rate of zero."""
    run_job(load_sft(max_steps=1, learning_rate=1e-3), tmp_path)
    (progress,) = [event for event in events_of(tmp_path) if isinstance(event, Progress)]
    assert progress.metrics["learning_rate"] == 1e-3
    assert losses(tmp_path)[1] < losses(tmp_path)[0]


def test_evaluations_and_checkpoints_at_their_steps(load_sft: LoadJob, tmp_path: Path) -> None:
    run_job(load_sft(max_steps=5, evaluate_every=2, checkpoint_every=3), tmp_path)
    assert set(losses(tmp_path)) == {0, 2, 4, 5}
    assert [event.step for event in events_of(tmp_path) if isinstance(event, Checkpoint)] == [3, 5]


@pytest.fixture
def spoilt(load_sft: LoadJob) -> Any:
    """A learning rate at which the loss rises after two steps."""
    return load_sft(max_steps=12, evaluate_every=1, early_stop=2, learning_rate=0.02)


def test_early_stop_keeps_the_best_checkpoint(spoilt: Any, tmp_path: Path) -> None:
    run_job(spoilt, tmp_path)
    found = [event for event in events_of(tmp_path) if isinstance(event, Evaluation) and event.step]
    *during, after = [event.metrics["eval_loss"] for event in found]
    best = during.index(min(during))
    assert len(during) == best + 1 + 2 < 12
    assert after == during[best]
    manifest = AdapterStore(tmp_path / "store").get(AdapterRef.parse("doctor@canary"))
    assert manifest.metrics["eval_loss"] == during[best]


@pytest.mark.parametrize("ago", [0, 1])
def test_patience_survives_a_kill(
    ago: int, spoilt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(spoilt, tmp_path / "whole").ref
    last = max(losses(tmp_path / "whole"))

    class Killed(BaseException): ...

    def write(self: EventLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, Checkpoint) and event.step == last - ago:
            raise Killed

    real = EventLog.write
    run_id = begin(spoilt, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "write", write)
        with pytest.raises(Killed):
            carry_out(run_id, tmp_path / "killed")
    assert carry_out(run_id, tmp_path / "killed").ref == whole
    assert max(losses(tmp_path / "killed")) == last


@pytest.mark.parametrize("step", [3, 7])
def test_after_a_kill_the_training_loss_covers_all_steps(
    step: int, load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the kill came after the last step, before publishing."""
    job = load_sft(max_steps=7, checkpoint_every=3)

    def manifest(data_dir: Path, ref: str) -> Any:
        return AdapterStore(data_dir / "store").get(AdapterRef.parse(ref))

    whole = manifest(tmp_path / "whole", run_job(job, tmp_path / "whole").ref)

    class Killed(BaseException): ...

    def write(self: EventLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, Checkpoint) and event.step == step:
            raise Killed

    real = EventLog.write
    run_id = begin(job, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "write", write)
        with pytest.raises(Killed):
            carry_out(run_id, tmp_path / "killed")
    found = manifest(tmp_path / "killed", carry_out(run_id, tmp_path / "killed").ref)
    assert max(losses(tmp_path / "killed")) == 7
    assert found.metrics == pytest.approx(whole.metrics)


def test_a_stop_while_the_result_is_written_stops_at_the_last_checkpoint(
    load_sft: LoadJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_job(load_sft(), tmp_path / "whole").ref

    def write(*_: Any, **__: Any) -> Path:
        raise KeyboardInterrupt

    run_id = begin(load_sft(), tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "write_result", write)
        with pytest.raises(Stopped, match="step 4, before anything was published"):
            carry_out(run_id, tmp_path / "stopped")
    assert events_of(tmp_path / "stopped")[-1].step == 4
    assert isinstance(events_of(tmp_path / "stopped")[-1], StoppedEvent)
    assert carry_out(run_id, tmp_path / "stopped").ref == whole
