"""Canary and shadow in the store: shares, promotion and rollback; and revisions that engines hold."""

import random
from pathlib import Path

import pytest

from adapters import (
    CANARY,
    SHADOW,
    AdapterNotFound,
    AdapterRef,
    AdapterStore,
    AliasMoved,
    NothingToRollBack,
    StoreDamaged,
    Traffic,
    is_in_share,
)
from tests.adapters.conftest import Start
from tests.adapters.folders import NAME, WHO


@pytest.fixture
def canary(store: AdapterStore, revisions: list[str]) -> str:
    """The third revision is the canary at 10 %; `default` is the fourth."""
    store.set_alias(NAME, CANARY, revisions[2], actor=WHO)
    store.split(NAME, CANARY, 10, actor=WHO)
    return revisions[2]


def test_a_share_needs_an_alias_and_is_removed_with_it(store: AdapterStore, canary: str) -> None:
    with pytest.raises(AdapterNotFound, match=f"{NAME}@{SHADOW}"):
        store.split(NAME, SHADOW, 5, actor=WHO)
    store.set_alias(NAME, SHADOW, canary, actor=WHO)
    store.split(NAME, SHADOW, 5, actor=WHO)
    assert store.traffic(NAME) == Traffic(canary=10, shadow=5)
    store.remove_alias(NAME, CANARY, actor=WHO, why="worse")
    assert store.traffic(NAME) == Traffic(shadow=5)
    store.set_alias(NAME, CANARY, canary, actor=WHO)
    assert store.traffic(NAME) == Traffic(shadow=5)


@pytest.mark.parametrize("percent", [-1, 100.5, float("nan"), float("inf")])
def test_invalid_percentage(store: AdapterStore, canary: str, percent: float) -> None:
    with pytest.raises(ValueError, match="canary"):
        store.split(NAME, CANARY, percent, actor=WHO)
    assert store.traffic(NAME) == Traffic(canary=10)


def test_promote(store: AdapterStore, revisions: list[str], canary: str) -> None:
    with pytest.raises(AliasMoved):
        store.promote(NAME, actor=WHO, expected=revisions[0])
    assert store.promote(NAME, actor=WHO, expected=canary) == canary
    assert store.aliases(NAME) == {"default": canary}
    assert store.traffic(NAME) == Traffic()
    with pytest.raises(AdapterNotFound):
        store.promote(NAME, actor=WHO)
    assert store.rollback(NAME, actor=WHO) == revisions[3]
    assert [entry.action for entry in store.log(NAME)[-4:]] == ["promote", "split", "unpoint", "rollback"]


def test_damaged_shares(store: AdapterStore, canary: str) -> None:
    (store.root / NAME / "traffic.json").write_text('{"canary": 1e999}')
    with pytest.raises(StoreDamaged, match="shares"):
        store.traffic(NAME)


def test_roll_back_to_any_earlier_revision(store: AdapterStore, revisions: list[str]) -> None:
    one, two, three, four = revisions
    assert store.rollback(NAME, to=two, actor=WHO) == two
    assert store.previous(NAME) == one
    store.set_alias(NAME, "default", four, actor=WHO)
    assert store.previous(NAME) == two
    assert (
        store.rollback(NAME, to=three, actor=WHO) == three
    )  # not an earlier revision of the stack: counts as a move
    assert store.rollback(NAME, actor=WHO) == four
    with pytest.raises(AdapterNotFound):
        store.rollback(NAME, to="0" * 12, actor=WHO)
    with pytest.raises(AdapterNotFound):
        store.rollback(NAME, "nightly", to=one, actor=WHO)


def test_rollback_agrees_with_a_stack(store: AdapterStore, revisions: list[str]) -> None:
    random_ = random.Random(7)
    store.remove_alias(NAME, "default", actor=WHO)
    stack: list[str] = []
    for _ in range(150):
        revision = random_.choice(revisions)
        if stack and random_.random() < 0.4:
            to = random_.choice([None, revision])
            try:
                store.rollback(NAME, to=to, actor=WHO)
            except NothingToRollBack:
                assert to is None
                assert len(stack) == 1
                continue
            if to is None:
                stack.pop()
            elif to in stack[:-1]:
                while stack.pop() != to or to in stack[-1:]:
                    pass
                stack.append(to)
            elif to != stack[-1]:
                stack.append(to)
        else:
            store.set_alias(NAME, "default", revision, actor=WHO)
            if stack[-1:] != [revision]:
                stack.append(revision)
        assert store.aliases(NAME)["default"] == stack[-1]


def test_prune_keeps_revisions_that_engines_hold(
    store: AdapterStore, revisions: list[str], tmp_path: Path, start: Start
) -> None:
    held = store.get(AdapterRef(NAME, revision=revisions[0]))
    code = """
import sys, time
from pathlib import Path
from adapters import AdapterRef, AdapterStore
store = AdapterStore(Path(sys.argv[1]))
with store.hold(store.get(AdapterRef.parse(sys.argv[2]))):
    print("held", flush=True)
    time.sleep(60)
"""
    process = start("-c", code, store.root, f"{NAME}@{revisions[1]}")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    with store.hold(held) as folder, store.hold(held):
        store.prune(NAME, keep=0, actor=WHO)
        assert {manifest.revision for manifest in store.revisions(NAME)} >= set(revisions[:2])
        assert (folder / "manifest.json").exists()
    process.kill()
    process.communicate()
    assert set(store.prune(NAME, keep=0, actor=WHO)) == {revisions[0], revisions[1]}
    with pytest.raises(AdapterNotFound), store.hold(held):
        pass


def test_shares_are_sticky_and_of_the_right_size() -> None:
    sessions = [f"session-{number}" for number in range(20_000)]

    def chosen(percent: float, revision: str = "3f2a9c1b77de") -> set[str]:
        return {s for s in sessions if is_in_share(percent, revision=revision, session=s)}

    ten = chosen(10)
    assert ten == chosen(10)
    assert chosen(0) == set()
    assert chosen(100) == set(sessions)
    assert abs(len(ten) - 2000) < 2.58 * (20_000 * 0.1 * 0.9) ** 0.5
    assert ten < chosen(25)
    other = chosen(10, "000000000000")
    assert abs(len(ten & other) - 200) < 60, "another revision gets other sessions"
