"""PPO whose answers a running service samples: drawn again alike, scored alike, and nothing of it left behind."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.service import ADMIN_KEY, Service
from training.config import load_config
from training.demo.corpus import write_corpus
from training.errors import ServiceError
from training.runs.events import Progress, read_events
from training.runs.execute import begin, carry_out

FLOAT_ERROR = 1e-4  # nats, of one token in float32


def _run(service: Service, path: Path, **changes: Any) -> tuple[str, list[dict[str, float]]]:
    # Of fewer answers than these, the estimate of the KL may lie below 0 by chance.
    job = {
        "stage": "ppo", "name": "asked", "base_model": "models/xinglin-demo", "policy": "doctor@default",
        "reward": {"function": "tests.training.stages.test_ppo:shortness"}, "train_files": ["demo/doctor.jsonl"],
        "rollout_service": service.url, "steps": 2, "batch_size": 48, "minibatch_size": 8, "max_new_tokens": 24,
        "learning_rate": 1e-3, "threads": 1, "golden": {"prompts": 8, "max_new_tokens": 8},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(job | changes))
    run_id = begin(load_config(path, root=service.data_dir), service.data_dir)
    published = carry_out(run_id, service.data_dir)
    events = read_events(service.data_dir / "runs" / run_id / "events.jsonl")
    return published.ref, [event.metrics for event in events if isinstance(event, Progress)]


def test_a_service_samples_what_ppo_learns_from(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XINGLIN_ADMIN_KEY", ADMIN_KEY)
    write_corpus(service.data_dir / "demo")
    ref, steps = _run(service, tmp_path / "ppo.yaml")
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert max(step["rollout_difference"] for step in steps) < FLOAT_ERROR
    assert steps[1]["kl"] > 0.001  # the second step's answers are by what the first one made
    again, others = _run(service, tmp_path / "ppo.yaml")
    for step in (*steps, *others):
        del step["rollout_difference"]  # how the engine rounds depends on what shares a batch
    assert (again, others) == (ref, steps)
    assert not [name for name in service.adapters() if name.startswith("asked-rollouts")]
    _, found = service.call("GET", "/v1/adapters/asked-rollouts")
    assert len(found.get("revisions", ())) <= 1  # one that the engine may still hold


def test_a_service_that_refuses_ends_the_run_with_the_reason(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(service.data_dir / "demo")
    monkeypatch.setenv("XINGLIN_ADMIN_KEY", "wrong")
    with pytest.raises(
        ServiceError, match=r"rollout_service: .*set XINGLIN_ADMIN_KEY to the service's admin key"
    ):
        _run(service, tmp_path / "ppo.yaml")
    with pytest.raises(ServiceError, match=r"rollout_service: .*check that it runs"):
        _run(service, tmp_path / "ppo.yaml", rollout_service="http://127.0.0.1:9")
