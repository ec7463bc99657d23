"""Resolving served names: base models, aliases, revisions, and the two sides of a canary."""

from collections import Counter
from datetime import UTC, datetime

import pytest

from adapters import Manifest, Traffic
from app.errors import AdapterUnavailable, ModelNotFound
from app.lifecycle.served_models import Choice, ServedModels


def _manifest(revision: str) -> Manifest:
    return Manifest(
        stage="sft", name="doctor", revision=revision, r=8, lora_alpha=16, target_modules=["q_proj"],
        golden_prompts=0, files={}, created_at=datetime.now(UTC),
    )  # fmt: skip


A, B, C = _manifest("a" * 12), _manifest("b" * 12), _manifest("c" * 12)


@pytest.fixture
def served() -> ServedModels:
    served = ServedModels(["base", "other"])
    served.point("doctor", "default", A)
    return served


@pytest.mark.parametrize("name", ["doctor", "doctor@default", f"doctor@{A.revision}"])
def test_name_alias_and_revision_resolve_to_the_same_manifest(served: ServedModels, name: str) -> None:
    assert served.choose(name) == Choice(A)
    assert served.choose("base") == Choice(None, base="base")
    assert served.choose("other") == Choice(None, base="other")


@pytest.mark.parametrize(
    "name", ["", "nobody", "doctor@canary", f"doctor@{B.revision}", "../etc/passwd", "a@b@c", "x" * 9999]
)
def test_unknown_models_are_not_found(served: ServedModels, name: str) -> None:
    served.expect("doctor", "default", A.revision)
    for number in range(50):
        served.point(f"more-{number}", "default", A)
    with pytest.raises(ModelNotFound) as caught:
        served.choose(name)
    assert caught.value.param == "model"
    assert len(str(caught.value)) < 400


def test_a_known_name_that_is_not_ready_says_so(served: ServedModels) -> None:
    served.forget("doctor", "default")
    served.expect("doctor", "default", A.revision)
    with pytest.raises(AdapterUnavailable):
        served.choose("doctor")


def test_the_default_alias_has_the_bare_name(served: ServedModels) -> None:
    served.point("doctor", "canary", B)
    assert [name for name, _ in served.named()] == ["doctor@canary", "doctor"]
    assert served.is_wanted(f"doctor@{B.revision}")
    served.forget("doctor", "canary")
    assert not served.is_wanted(f"doctor@{B.revision}")


SESSIONS = [f"patient-{number}" for number in range(2000)]


def test_a_canary_gets_its_share_and_sessions_are_sticky(served: ServedModels) -> None:
    served.point("doctor", "canary", B)
    served.share("doctor", Traffic(canary=10))
    sides = {session: served.choose("doctor", session).manifest for session in SESSIONS}
    share = Counter(manifest.revision for manifest in sides.values() if manifest)[B.revision]
    assert abs(share - 200) <= 2.576 * (2000 * 0.1 * 0.9) ** 0.5, "outside the binomial 99 % interval"
    for _ in range(3):
        assert all(served.choose("doctor", session).manifest == side for session, side in sides.items())
    # Requested by its own name, each side always answers.
    assert served.choose("doctor@canary", SESSIONS[0]) == Choice(B)
    assert served.choose(f"doctor@{A.revision}", SESSIONS[0]) == Choice(A)
    # Without a session, each request is drawn anew.
    drawn = Counter(served.choose("doctor").manifest == B for _ in range(2000))[True]
    assert abs(drawn - 200) < 100

    served.share("doctor", Traffic(canary=30))
    assert all(
        served.choose("doctor", session).manifest == B for session, side in sides.items() if side == B
    ), "a larger share took a session off the canary"

    served.share("doctor", Traffic())
    assert all(served.choose("doctor", session).manifest == A for session in SESSIONS)


def test_a_canary_that_is_not_ready_gets_no_requests(served: ServedModels) -> None:
    served.share("doctor", Traffic(canary=100, shadow=100))
    assert served.choose("doctor", "x") == Choice(A)


def test_a_shadow_gets_copies_of_default_and_canary_requests(served: ServedModels) -> None:
    served.point("doctor", "canary", B)
    served.point("doctor", "shadow", C)
    served.share("doctor", Traffic(canary=50, shadow=100))
    assert all(served.choose("doctor", session).shadow == C for session in SESSIONS)
    served.share("doctor", Traffic(canary=50, shadow=25))
    copies = sum(served.choose("doctor", session).shadow == C for session in SESSIONS)
    assert 400 < copies < 600
