"""Leases: what answers to a name, and for how long it is held."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from adapters import Manifest
from app.engine.base import LoadedAdapter
from app.errors import AdapterUnavailable, ModelNotFound
from app.served_models import Resident, ServedModels


def _resident(revision: str) -> Resident:
    manifest = Manifest(
        stage="sft", name="doctor", revision=revision, r=8, lora_alpha=16, target_modules=["q_proj"],
        golden_prompts=0, files={}, created_at=datetime.now(UTC),
    )  # fmt: skip
    return Resident(manifest, LoadedAdapter(f"doctor@{revision}", 1, Path()), is_proven=True)


A, B = "a" * 12, "b" * 12


@pytest.fixture
def served() -> ServedModels:
    return ServedModels("base")


def test_the_base_model_needs_no_adapter(served: ServedModels) -> None:
    with served.lease("base") as lease:
        assert lease.adapter is None


@pytest.mark.parametrize("name", ["doctor", "doctor@default", f"doctor@{A}"])
def test_name_alias_and_revision_lead_to_the_same(served: ServedModels, name: str) -> None:
    resident = _resident(A)
    served.point("doctor", "default", resident)
    with served.lease(name) as lease:
        assert lease.resident is resident
        assert lease.fingerprint == f"doctor@{A}"


def test_a_lease_holds_its_revision_while_the_alias_moves(served: ServedModels) -> None:
    old, new = _resident(A), _resident(B)
    served.point("doctor", "default", old)
    with served.lease("doctor") as first, served.lease("doctor"):
        served.point("doctor", "default", new)
        assert first.resident is old
        assert old.leases == 2
        assert not old.unused.is_set()
        with served.lease("doctor") as later:
            assert later.resident is new
    assert old.leases == 0
    assert old.unused.is_set()


@pytest.mark.parametrize(
    "name", ["", "nobody", "doctor@canary", f"doctor@{B}", "../etc/passwd", "a@b@c", "x" * 9999]
)
def test_what_is_not_served_is_not_found(served: ServedModels, name: str) -> None:
    served.point("doctor", "default", _resident(A))
    served.expected = {("doctor", "default")}
    with pytest.raises(ModelNotFound) as caught:
        served.lease(name)
    assert caught.value.param == "model"
    assert len(str(caught.value)) < 300


def test_a_known_name_that_is_not_ready_says_so(served: ServedModels) -> None:
    served.expected = {("doctor", "default")}
    with pytest.raises(AdapterUnavailable):
        served.lease("doctor")


def test_default_goes_by_the_bare_name(served: ServedModels) -> None:
    served.point("doctor", "default", _resident(A))
    served.point("doctor", "canary", _resident(B))
    assert [name for name, _ in served.named()] == ["doctor@canary", "doctor"]
