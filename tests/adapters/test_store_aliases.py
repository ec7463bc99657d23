"""adapters/store.py: aliases, their log, rollback and prune."""

import random
from pathlib import Path

import pytest

from adapters import AdapterRef, AdapterStore, NothingToRollBack
from tests.adapters.folders import NAME, WHO, left_in_staging, publish


def test_every_move_is_in_the_log(store: AdapterStore, revisions: list[str]) -> None:
    one, two = revisions[:2]
    store.set_alias(NAME, "canary", one, actor="li", why="first")
    store.set_alias(NAME, "canary", one, actor="li", why="again: not a move")
    store.set_alias(NAME, "canary", two, actor="wang", why="better\nwith a line \u2028 or two")
    store.rollback(NAME, "canary", actor="zhao", why="worse")
    store.remove_alias(NAME, "canary", actor="li", why="done")
    assert [
        (entry.action, entry.actor, entry.from_revision, entry.to_revision, entry.why)
        for entry in store.log(NAME)
        if entry.alias == "canary"
    ] == [
        ("point", "li", None, one, "first"),
        ("point", "wang", one, two, "better\nwith a line \u2028 or two"),
        ("rollback", "zhao", two, one, "worse"),
        ("unpoint", "li", one, None, "done"),
    ]
    times = [entry.at for entry in store.log(NAME)]
    assert times == sorted(times)
    assert store.aliases(NAME) == {"default": revisions[-1]}


def test_a_line_torn_by_a_crash_does_not_damage_others(store: AdapterStore, revisions: list[str]) -> None:
    """The line may be torn in the middle of a character."""
    store.set_alias(NAME, "default", revisions[0], actor=WHO, why="换药")
    path = store.root / NAME / "log.jsonl"
    whole = store.log(NAME)
    line = path.read_bytes().splitlines(keepends=True)[-1]
    for end in (1, line.index("药".encode()) + 1, len(line) - 1):
        with path.open("ab") as log:
            log.write(line[:end])
        assert store.log(NAME)[: len(whole)] == whole
        store.set_alias(NAME, "canary", revisions[end % 2], actor=WHO)
        store.remove_alias(NAME, "canary", actor=WHO)
        assert [entry.action for entry in store.log(NAME)[-2:]] == ["point", "unpoint"]
        assert store.previous(NAME) == revisions[3]


def test_rollbacks_in_a_row_go_back_step_by_step(store: AdapterStore, revisions: list[str]) -> None:
    one, two, three, four = revisions
    for revision in (one, four):  # moves of another alias do not count
        store.set_alias(NAME, "canary", revision, actor=WHO)
    assert store.previous(NAME) == three
    assert [store.rollback(NAME, actor=WHO) for _ in range(3)] == [three, two, one]
    with pytest.raises(NothingToRollBack, match=f"before {one}"):
        store.rollback(NAME, actor=WHO)
    assert store.get(AdapterRef(NAME, alias="default")).revision == one
    store.set_alias(NAME, "default", four, actor=WHO)
    assert store.rollback(NAME, actor=WHO) == one


def test_rollback_past_a_revision_pointed_at_twice(store: AdapterStore, revisions: list[str]) -> None:
    one, *_, four = revisions
    store.set_alias(NAME, "canary", one, actor=WHO)
    store.set_alias(NAME, "canary", four, actor=WHO)
    store.set_alias(NAME, "canary", one, actor=WHO)
    assert [store.rollback(NAME, "canary", actor=WHO) for _ in range(2)] == [four, one]
    with pytest.raises(NothingToRollBack):
        store.rollback(NAME, "canary", actor=WHO)


def test_rollback_undoes_moves_like_a_stack(store: AdapterStore, revisions: list[str]) -> None:
    """Compare with a stack over random moves, with crashes between writing the log and the alias."""
    chance = random.Random(1)
    aliases = store.root / NAME / "aliases"
    stack = list(revisions)
    for _ in range(150):
        before = (aliases / "default").read_text()
        crashes = chance.random() < 0.3
        if chance.random() < 0.5:
            revision = chance.choice([revision for revision in revisions if revision != stack[-1]])
            store.set_alias(NAME, "default", revision, actor=WHO)
            if not crashes:
                stack.append(revision)
        elif len(stack) > 1:
            assert store.rollback(NAME, actor=WHO) == stack[-2]
            if not crashes:
                stack.pop()
        else:
            with pytest.raises(NothingToRollBack):
                store.rollback(NAME, actor=WHO)
        if crashes:
            (aliases / "default").write_text(before)
        assert store.get(AdapterRef(NAME, alias="default")).revision == stack[-1]


def test_no_rollback_past_a_removed_alias(store: AdapterStore, revisions: list[str]) -> None:
    store.remove_alias(NAME, "default", actor=WHO)
    store.set_alias(NAME, "default", revisions[0], actor=WHO)
    with pytest.raises(NothingToRollBack):
        store.rollback(NAME, actor=WHO)


# Prune


def test_prune_keeps_the_newest_and_those_in_use(
    store: AdapterStore, revisions: list[str], tmp_path: Path
) -> None:
    one, two, three, four = revisions
    five = publish(store, tmp_path, 5)
    store.set_alias(NAME, "canary", one, actor=WHO)
    # default: four, previously three; canary: one; newest: five
    assert store.prune(NAME, keep=1, actor="li", why="space") == [two]
    assert [manifest.revision for manifest in store.revisions(NAME)] == [one, three, four, five]
    assert [(e.action, e.actor, e.from_revision) for e in store.log(NAME)][-1] == ("prune", "li", two)
    assert left_in_staging(store) == []
    assert store.prune(NAME, keep=0, actor=WHO) == [five]
    assert store.rollback(NAME, actor=WHO) == three


@pytest.mark.parametrize("keep", [4, 5, 100])
def test_prune_removes_nothing_below_the_limit(store: AdapterStore, tmp_path: Path, keep: int) -> None:
    for seed in range(4):
        publish(store, tmp_path, seed)
    assert store.prune(NAME, keep=keep, actor=WHO) == []
    assert len(store.revisions(NAME)) == 4


def test_no_rollback_to_a_pruned_revision(store: AdapterStore, revisions: list[str]) -> None:
    one, two, three, _ = revisions
    assert store.prune(NAME, keep=0, actor=WHO) == [one, two]
    assert store.rollback(NAME, actor=WHO) == three
    with pytest.raises(NothingToRollBack, match=f"previous revision of doctor@default, {two}, was pruned"):
        store.rollback(NAME, actor=WHO)
    assert store.get(AdapterRef(NAME, alias="default")).revision == three
