"""Errors between PPO and its rollout service, on a fake; tests/e2e/test_rollouts.py uses a real service."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.judges import running_judge
from training.errors import ServiceError
from training.rl.rollouts import Rollouts


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Rollouts published as revision r1 to a fake that names no revision and refuses every removal."""
    with running_judge(lambda _: "Hello.") as service:
        policy: Any = None
        found = Rollouts(service.url.removesuffix("/v1"), "doctor-rollouts", policy, Path)
        monkeypatch.setattr(found, "_publish", lambda: setattr(found, "_revision", "r1"))
        yield found


def test_an_answer_by_another_revision_is_an_error(rollouts: Any) -> None:
    with pytest.raises(ServiceError, match="doctor-rollouts@None answered instead of @r1: someone else"):
        rollouts.answer([[{"role": "user", "content": "?"}]], 4)


def test_a_failed_removal_from_the_service_is_only_logged(
    rollouts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with rollouts:
        rollouts._publish()
    (logged,) = [record for record in caplog.records if record.name == "training.rl.rollouts"]
    assert logged.getMessage().startswith(
        "doctor-rollouts could not be removed from the service; remove it there: "
    )
