import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import AdapterStore
from training.runs.events import Evaluation, EventLog, Started
from training.runs.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    with EventLog(folder / "events.jsonl") as events:
        yield Run(folder, events, AdapterStore(tmp_path / "store"))


def write_checkpoint(run: Run, step: int, state: str | None = None) -> Path:
    folder = run.checkpoint(step)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def whole(step: int) -> str:
    return json.dumps({"global_step": step})


def test_the_id_is_the_name_of_the_folder(run: Run) -> None:
    assert run.id == "one"


def test_a_new_run_has_no_checkpoint(run: Run) -> None:
    assert run.last_checkpoint() is None
    assert run.steps_done() == 0


def test_the_last_checkpoint_has_the_most_steps(run: Run) -> None:
    for step in (9, 10, 100, 99):
        write_checkpoint(run, step, whole(step))
    assert run.last_checkpoint() == run.checkpoint(100)
    assert run.steps_done() == 100


def test_the_next_checkpoint_replaces_an_incomplete_one(run: Run) -> None:
    def killed(folder: Path) -> None:
        (folder / "state.pt").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(2, killed, kept=2)
    run.save_checkpoint(4, lambda folder: (folder / "more.pt").touch(), kept=2)
    (left,) = run.checkpoint(4).parent.iterdir()
    assert left == run.last_checkpoint()
    assert {file.name for file in left.iterdir()} == {"more.pt", "trainer_state.json"}


@pytest.mark.parametrize("state", [None, "", whole(6)[:5]])
def test_an_incomplete_checkpoint_is_skipped_and_removed(run: Run, state: str | None) -> None:
    good, older = write_checkpoint(run, 4, whole(4)), write_checkpoint(run, 2, whole(2))
    half = write_checkpoint(run, 6, state)
    assert run.last_checkpoint() == good
    assert not half.exists()
    assert older.exists()


def test_a_single_incomplete_checkpoint_counts_as_none(run: Run) -> None:
    half = write_checkpoint(run, 6)
    assert run.last_checkpoint() is None
    assert not half.exists()


def test_metrics_from_before_training_are_reused(run: Run) -> None:
    assert run.measured_before() is None
    run.events.write(Started(run_id="one", stage="sft", name="doctor"))
    run.events.write(Evaluation(step=0, metrics={"eval_loss": 3.0}))
    run.events.write(Evaluation(step=5, metrics={"eval_loss": 1.0}))
    assert run.measured_before() == {"eval_loss": 3.0}
