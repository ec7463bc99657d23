"""What goes wrong between PPO and the service that samples for it, without a service; with one in e2e/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.judges import running_judge
from training.errors import ServiceError
from training.rl.rollouts import Rollouts


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Published as revision r1, to what answers by none and takes back nothing."""
    with running_judge(lambda _: "Hello.") as service:
        policy: Any = None
        found = Rollouts(service.url.removesuffix("/v1"), "doctor-rollouts", policy, Path)
        monkeypatch.setattr(found, "_publish", lambda: setattr(found, "_revision", "r1"))
        yield found


def test_another_revision_that_answers_ends_the_run_with_the_reason(rollouts: Any) -> None:
    with pytest.raises(ServiceError, match="doctor-rollouts@None answered instead of @r1: somebody else"):
        rollouts.answer([[{"role": "user", "content": "?"}]], 4)


def test_what_cannot_be_removed_from_the_service_ends_nothing(
    rollouts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with rollouts:
        rollouts._publish()
    (told,) = [record for record in caplog.records if record.name == "training.rl.rollouts"]
    assert told.getMessage().startswith("doctor-rollouts stays at the service, until it is removed there: ")
