"""One job in two processes on CPUs: the result is that of one process with the same batches."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from adapters import AdapterRef, AdapterStore
from tests.training import processes
from tests.training.jobs import SFT, run_job
from tests.training.stages.conftest import RM, pairs
from training.config import load_config
from training.errors import ConfigError
from training.runs.events import (
    Checkpoint,
    Evaluation,
    Event,
    Progress,
    Resumed,
    Stopped,
    Succeeded,
    read_events,
)
from training.runs.execute import begin
from training.runs.stop import EXIT_CODE

LAUNCHERS = Path(__file__).parents[3] / "deploy/accelerate"
TOLERANCE = 1e-4  # relative, of the loss: sums differ in order, over all steps


def write_job(tiny_dir: Path, path: Path, **changes: Any) -> Path:
    """Eight rows, one global batch: every step sees them all, however they are split among processes."""
    rows = (tiny_dir / "doctor.jsonl").read_text().splitlines(keepends=True)[:8]
    path.with_name("eight.jsonl").write_text("".join(rows))
    files = {"train_files": [str(path.with_name("eight.jsonl"))], "base_model": str(tiny_dir / "models/tiny")}
    files |= {"evaluation_files": [str(tiny_dir / "heldout.jsonl")]}
    path.write_text(yaml.safe_dump({**SFT, **files, "learning_rate": 1e-3, "max_steps": 11, **changes}))
    return path


def events_of(data_dir: Path) -> list[Event]:
    (path,) = (data_dir / "runs").glob("*/events.jsonl")
    return read_events(path)


def losses(data_dir: Path) -> list[float]:
    return [event.metrics["loss"] for event in events_of(data_dir) if isinstance(event, Progress)]


def forgotten(data_dir: Path) -> list[float]:
    evaluations = [event.metrics for event in events_of(data_dir) if isinstance(event, Evaluation)]
    return [metrics["general_loss"] for metrics in evaluations if "general_loss" in metrics]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_two_processes_train_like_one(tiny_dir: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    general = {"general_files": [str(tiny_dir / "plain.jsonl")]}
    run_job(load_config(write_job(tiny_dir, tmp_path / "one.yaml", batch_size=8, **general)), alone)

    job = write_job(tiny_dir, tmp_path / "two.yaml", batch_size=4, **general)
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", LAUNCHERS / "ddp.yaml"]
    options = ["--num_processes", "2", "--main_process_port", str(free_port())]
    command = [*launch, *options, "-m", "training", "run", job, "--data-dir", together]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd=LAUNCHERS.parents[1]
    )
    assert done.returncode == 0, done.stderr

    assert losses(together) == pytest.approx(losses(alone), rel=TOLERANCE)
    assert forgotten(together) == pytest.approx(forgotten(alone), rel=TOLERANCE)
    assert len(forgotten(together)) == 2
    assert isinstance(events_of(together)[-1], Succeeded)
    assert done.stdout.count("published doctor@") == 1
    (published,) = (together / "store/doctor/revisions").iterdir()
    assert AdapterStore(together / "store").get(AdapterRef.parse("doctor@canary")).revision == published.name


def test_pairs_are_counted_over_all_processes(tiny_dir: Path, tmp_path: Path) -> None:
    """Neither process sees all seven pairs, and one pair is repeated to fill the last batch."""
    lines = pairs(0).splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[7:]))
    (tmp_path / "seven.jsonl").write_text("".join(lines[:7]))
    files = {
        "train_files": [str(tmp_path / "pairs.jsonl")],
        "evaluation_files": [str(tmp_path / "seven.jsonl")],
    }
    files["base_model"] = str(tiny_dir / "models/tiny")
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**RM, **files, "batch_size": 2, "max_steps": 1}))
    run_job(load_config(job), tmp_path / "alone")
    ranks = start("run", job, "--data-dir", tmp_path / "together", told=tmp_path)
    assert [wait_for(rank) for rank in ranks] == [0, 0], told(tmp_path)

    def before(data_dir: Path) -> float:
        return next(
            event.metrics["eval_accuracy"] for event in events_of(data_dir) if isinstance(event, Evaluation)
        )

    assert before(tmp_path / "together") == before(tmp_path / "alone")
    assert before(tmp_path / "together") * 7 == pytest.approx(round(before(tmp_path / "together") * 7))


def test_a_stop_reaches_all_processes_and_they_resume_together(tiny_dir: Path, tmp_path: Path) -> None:
    job = write_job(tiny_dir, tmp_path / "job.yaml", batch_size=4, max_steps=400, checkpoint_every=20)
    data_dir = tmp_path / "data"
    ranks = start("run", job, "--data-dir", data_dir, told=tmp_path)
    deadline = time.monotonic() + 60
    while not any((data_dir / "runs").glob("*/checkpoints/checkpoint-20/trainer_state.json")):
        assert time.monotonic() < deadline
        assert all(rank.is_alive() for rank in ranks), told(tmp_path)
        time.sleep(0.05)
    os.kill(ranks[1].pid or 0, signal.SIGTERM)  # only one of them, and not the leader
    assert [wait_for(rank) for rank in ranks] == [EXIT_CODE, EXIT_CODE], told(tmp_path)
    *_, checkpoint, stopped = events_of(data_dir)
    assert isinstance(checkpoint, Checkpoint)
    assert isinstance(stopped, Stopped)
    assert 20 <= stopped.step == checkpoint.step < 400
    assert told(tmp_path).count(f"stopped at step {stopped.step} of 400") == 2

    (folder,) = (data_dir / "runs").iterdir()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "max_steps": stopped.step + 2}))
    ranks = start("resume", folder.name, "--accept-changes", "--data-dir", data_dir, told=tmp_path)
    assert [wait_for(rank) for rank in ranks] == [0, 0], told(tmp_path)
    events = events_of(data_dir)
    assert [event.step for event in events if isinstance(event, Resumed)] == [stopped.step]
    assert json.loads((folder / "inputs.json").read_text())["changed"] == ["setting max_steps"]
    assert isinstance(events[-1], Succeeded)


def test_a_single_process_stage_refuses_a_launcher(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = write_job(tiny_dir, tmp_path / "job.yaml")
    asked = yaml.safe_load(job.read_text())
    del asked["max_steps"]
    ppo = {"stage": "ppo", "policy": "doctor", "reward": "judge", "steps": 1}
    job.write_text(yaml.safe_dump(asked | ppo))
    with pytest.raises(ConfigError, match="stage ppo trains in one process, but a launcher started 2"):
        begin(load_config(job), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_launcher_configs(name: str) -> None:
    read = load_config_from_file(str(LAUNCHERS / f"{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert read.distributed_type == kinds[name]
    assert read.fsdp_config.get("fsdp_version") == (2 if name == "fsdp2" else None)
    assert read.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(name)


def start(*arguments: object, told: Path) -> list[Any]:
    """Start a command in two processes, with the environment a launcher would set."""
    port = free_port()
    ranks = []
    for rank in range(2):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        asked = [*map(str, arguments)]
        process = processes.FORKED.Process(
            target=_main, args=(asked, told / f"told-{rank}", json.dumps(environment))
        )
        process.start()
        ranks.append(process)
    return ranks


def _main(arguments: list[str], told: Path, environment: str) -> None:
    os.environ.update({name: str(value) for name, value in json.loads(environment).items()})
    processes._main(arguments, told, None, None)


def wait_for(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(60)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def told(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("told-*")))
