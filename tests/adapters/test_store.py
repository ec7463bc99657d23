"""adapters/store.py: what a store promises to its readers, whoever writes to it and dies at it."""

import errno
import os
import random
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest

from adapters import (
    AdapterNotFound,
    AdapterRef,
    AdapterStore,
    InvalidAdapter,
    InvalidRef,
    NothingToRollBack,
    StoreDamaged,
    read_golden,
    validate,
)
from tests.adapters import killed
from tests.adapters.conftest import Start
from tests.adapters.folders import BASE, GOLDEN, Folder, make_folder

NAME, WHO = "doctor", "test"


def publish(store: AdapterStore, folder: Path, seed: int) -> str:
    """Publish an adapter of its own weights; returns its revision."""
    return store.publish(make_folder(folder / f"seed-{seed}", seed).write(), NAME, actor=WHO).revision


@pytest.fixture
def revisions(store: AdapterStore, tmp_path: Path) -> list[str]:
    """Four published revisions, to which `default` was pointed one after another."""
    made = [publish(store, tmp_path, seed) for seed in range(4)]
    for revision in made:
        store.set_alias(NAME, "default", revision, actor=WHO)
    return made


def left_in_staging(store: AdapterStore) -> list[str]:
    return [path.name for path in (store.root / ".staging").glob("[!.]*")]


# Publish


def test_what_is_published_can_be_had_back(adapter: Folder, store: AdapterStore) -> None:
    adapter.golden = [GOLDEN]
    adapter.others = {"chat_template.jinja": b"{{ x }}", "README.md": b"about"}
    adapter.provenance |= {
        "task": "chat",
        "dtype": "bfloat16",
        "parent": "doctor@default",
        "licence": "Apache-2.0",
    }
    published = store.publish(adapter.write(), NAME, actor="li", why="月度更新", base=BASE)

    manifest = store.get(AdapterRef(NAME, revision=published.revision))
    assert manifest == published
    assert {key: getattr(manifest, key) for key in adapter.provenance} == adapter.provenance
    assert (manifest.name, manifest.r, manifest.lora_alpha, manifest.golden_prompts) == (NAME, 4, 8.0, 1)
    assert manifest.target_modules == ["down_proj", "q_proj"]
    folder = store.verify(manifest)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "golden.jsonl", "manifest.json"
    ]  # fmt: skip
    assert read_golden(folder / "golden.jsonl") == [GOLDEN]
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    assert tensors == (adapter.path / "adapter_model.safetensors").read_bytes()
    assert manifest.files["adapter_model.safetensors"] == manifest.tensor_digest
    assert manifest.chat_template_digest == manifest.files["chat_template.jinja"]
    [entry] = store.log(NAME)
    assert (entry.action, entry.actor, entry.why, entry.to_revision) == (
        "publish",
        "li",
        "月度更新",
        manifest.revision,
    )
    assert store.names() == [NAME]
    assert store.aliases(NAME) == {}
    assert left_in_staging(store) == []


def test_every_user_may_read_what_only_the_trainer_could(adapter: Folder, store: AdapterStore) -> None:
    adapter.write()
    assert (adapter.path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o600
    before = os.umask(0o077)
    try:
        folder = store.verify(store.publish(adapter.path, NAME, actor=WHO))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_same_content_is_one_revision(adapter: Folder, store: AdapterStore) -> None:
    first = store.publish(adapter.write(), NAME, actor=WHO)
    adapter.config |= {
        "target_modules": ["down_proj", "q_proj"],
        "base_model_name_or_path": "/elsewhere/tiny",
    }
    adapter.provenance |= {"run_id": "another", "metrics": {}}
    adapter.others = {"README.md": b"another"}
    second = store.publish(adapter.write(), NAME, actor=WHO)
    assert second == first  # with the provenance of the first time
    assert store.revisions(NAME) == [first]
    assert len(store.log(NAME)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.config.update(lora_alpha=16),
        lambda f: f.tensors.update({next(iter(f.tensors)): next(iter(f.tensors.values())) * 2}),
        lambda f: f.golden.append(GOLDEN),
        lambda f: f.others.update({"chat_template.jinja": b"x"}),
        lambda f: f.provenance.update(base_model="another"),
    ],
    ids=["config", "tensors", "golden prompts", "chat template", "base model"],
)
def test_other_content_is_another_revision(adapter: Folder, store: AdapterStore, change) -> None:
    first = store.publish(adapter.write(), NAME, actor=WHO)
    change(adapter)
    second = store.publish(adapter.write(), NAME, actor=WHO)
    assert second.revision != first.revision
    assert store.revisions(NAME) == [first, second]


def test_a_revision_moves_to_another_store_with_its_provenance(
    reward: Folder, store: AdapterStore, tmp_path: Path
) -> None:
    ours = store.publish(reward.write(), NAME, actor=WHO)
    other = AdapterStore(tmp_path / "production")
    theirs = other.publish(store.verify(ours), "triage", actor=WHO)
    assert theirs.model_dump(exclude={"name", "created_at"}) == ours.model_dump(
        exclude={"name", "created_at"}
    )
    other.verify(theirs)


def test_a_revision_in_the_store_validates_as_what_it_is(reward: Folder, store: AdapterStore) -> None:
    """Of another base, and of another task, as its manifest says: its provenance.json is gone."""
    reward.provenance["base_fingerprint"] = "f" * 16
    folder = store.verify(store.publish(reward.write(), NAME, actor=WHO))
    assert validate(folder).provenance.task == "reward"
    with pytest.raises(InvalidAdapter, match="fingerprint"):
        validate(folder, BASE)


def test_what_is_refused_leaves_nothing(adapter: Folder, store: AdapterStore, tmp_path: Path) -> None:
    adapter.config["r"] = 5
    with pytest.raises(InvalidAdapter):
        store.publish(adapter.write(), NAME, actor=WHO)
    with pytest.raises(InvalidAdapter):
        store.publish(tmp_path / "nowhere", NAME, actor=WHO)
    adapter.config["r"] = 4
    adapter.provenance["base_fingerprint"] = "f" * 16
    with pytest.raises(InvalidAdapter, match="fingerprint"):
        store.publish(adapter.write(), NAME, actor=WHO, base=BASE)
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/x", "A", "a" * 10_000])
def test_a_bad_name_reaches_no_file(adapter: Folder, store: AdapterStore, name: str) -> None:
    adapter.write()
    for call in (
        lambda: store.publish(adapter.path, name, actor=WHO),
        lambda: store.revisions(name),
        lambda: store.aliases(name),
        lambda: store.log(name),
        lambda: store.get(AdapterRef(name, alias="default")),
        lambda: store.get(AdapterRef("doctor", revision=name or "..")),
        lambda: store.set_alias(name, "default", "0" * 12, actor=WHO),
        lambda: store.set_alias("doctor", name, "0" * 12, actor=WHO),
        lambda: store.rollback(name, actor=WHO),
        lambda: store.prune(name, keep=0, actor=WHO),
    ):
        with pytest.raises(InvalidRef):
            call()
    assert not store.root.exists()


@pytest.mark.parametrize(
    ("slip_in", "problem"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "links"),
        (lambda path: path.write_bytes(b"garbage"), "cut short, or is no safetensors file"),
    ],
    ids=["link", "garbage"],
)
def test_the_folder_may_change_while_it_is_copied(
    adapter: Folder, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, slip_in, problem: str
) -> None:
    """What counts is what was copied, and not what lies in the folder before and after."""
    adapter.write()
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path, **options: bool) -> None:
        if source.name == "adapter_model.safetensors":
            away = source.rename(source.with_suffix(".away"))
            slip_in(source)
            copyfile(source, target, **options)
            away.replace(source)
        else:
            copyfile(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(InvalidAdapter, match=problem):
        store.publish(adapter.path, NAME, actor=WHO)
    assert store.names() == left_in_staging(store) == []


# Read


def test_what_is_not_there(store: AdapterStore, revisions: list[str]) -> None:
    assert AdapterStore(store.root / "nowhere").names() == []
    assert store.aliases("nobody") == {}
    assert store.log("nobody") == []
    for call in (
        lambda: store.revisions("nobody"),
        lambda: store.get(AdapterRef("nobody", alias="default")),
        lambda: store.get(AdapterRef(NAME, alias="canary")),
        lambda: store.get(AdapterRef(NAME, revision="0" * 12)),
        lambda: store.set_alias(NAME, "default", "0" * 12, actor=WHO),
        lambda: store.set_alias("nobody", "default", revisions[0], actor=WHO),
        lambda: store.remove_alias(NAME, "canary", actor=WHO),
        lambda: store.remove_alias("nobody", "default", actor=WHO),
        lambda: store.rollback(NAME, "canary", actor=WHO),
        lambda: store.rollback("nobody", actor=WHO),
        lambda: store.rollback_target("nobody"),
        lambda: store.prune("nobody", keep=0, actor=WHO),
    ):
        with pytest.raises(AdapterNotFound):
            call()
    assert not (store.root / "nobody").exists()  # a wrong name leaves no trace
    assert store.aliases(NAME) == {"default": revisions[-1]}


def test_a_name_without_revisions_is_no_adapter(store: AdapterStore, tmp_path: Path) -> None:
    """As after a kill between the folder and the revision, or when all were pruned."""
    publish(store, tmp_path, 0)
    assert len(store.prune(NAME, keep=0, actor=WHO)) == 1
    assert store.names() == []


def test_strange_things_in_the_store_are_passed_over(store: AdapterStore, revisions: list[str]) -> None:
    inside = store.root / NAME / "revisions"
    shutil.copytree(inside / revisions[0], inside / f"{revisions[0]}.bak")
    (inside / ".nfs0001").touch()
    (store.root / "lost+found").mkdir()
    (store.root / NAME / "aliases" / ".default").write_text("torn")
    (store.root / ".staging" / "note").touch()
    assert store.names() == [NAME]
    assert [manifest.revision for manifest in store.revisions(NAME)] == revisions
    assert store.aliases(NAME) == {"default": revisions[-1]}
    assert store.publish(store.folder(NAME, revisions[0]), NAME, actor=WHO).revision == revisions[0]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["a byte", "gone"])
def test_verify_finds_any_damage_and_publishing_again_repairs_it(
    store: AdapterStore, revisions: list[str], tmp_path: Path, file: str, damage: str
) -> None:
    manifest = store.get(AdapterRef(NAME, revision=revisions[1]))
    path = store.verify(manifest) / file
    if damage == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    with pytest.raises(StoreDamaged, match=rf"^{file} of doctor@{revisions[1]}") as caught:
        store.verify(manifest)
    assert str(tmp_path) not in str(caught.value)

    assert publish(store, tmp_path, 1) == revisions[1]
    store.verify(store.get(AdapterRef(NAME, revision=revisions[1])))
    assert left_in_staging(store) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, _: path.write_bytes(b""),
        lambda path, _: path.write_bytes(b"\xff"),
        lambda path, _: path.write_text(path.read_text().replace('"r": 4', '"r": "x"')),
        lambda path, _: path.write_text(path.read_text().replace(NAME, "nurse")),
        lambda path, _: path.write_text(path.read_text().replace('config.json": "', 'config.json": "0')),
        lambda path, other: shutil.copyfile(other, path),
    ],
    ids=["empty", "no UTF-8", "no rank", "another name", "another digest", "that of another revision"],
)
def test_a_manifest_must_be_that_of_its_folder(
    store: AdapterStore, revisions: list[str], tmp_path: Path, damage
) -> None:
    path = store.folder(NAME, revisions[3]) / "manifest.json"
    damage(path, store.folder(NAME, revisions[2]) / "manifest.json")
    with pytest.raises(StoreDamaged, match=f"manifest of doctor@{revisions[3]}"):
        store.get(AdapterRef(NAME, alias="default"))
    assert store.rollback(NAME, actor=WHO) == revisions[2]  # now more than ever
    assert publish(store, tmp_path, 3) == revisions[3]
    assert len(store.revisions(NAME)) == 4


@pytest.mark.parametrize("content", [b"", b"../../etc", b"\xff", b"default"])
def test_an_alias_file_that_holds_no_revision(
    store: AdapterStore, revisions: list[str], content: bytes
) -> None:
    """It stands in nobody else's way, and is pointed again like any other."""
    store.set_alias(NAME, "canary", revisions[1], actor=WHO)
    (store.root / NAME / "aliases" / "default").write_bytes(content)
    with pytest.raises(StoreDamaged, match="doctor@default points at no revision: point it"):
        store.get(AdapterRef(NAME, alias="default"))
    assert store.aliases(NAME).keys() == {"default", "canary"}
    assert store.get(AdapterRef(NAME, alias="canary")).revision == revisions[1]
    store.set_alias(NAME, "default", revisions[0], actor=WHO)
    assert store.get(AdapterRef(NAME, alias="default")).revision == revisions[0]
    with pytest.raises(NothingToRollBack):
        store.rollback(NAME, actor=WHO)
    assert store.prune(NAME, keep=0, actor=WHO) == revisions[2:]


# Aliases


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


def test_a_line_torn_by_a_crash_swallows_no_other(store: AdapterStore, revisions: list[str]) -> None:
    """Torn in the middle of a character, too."""
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
        assert store.rollback_target(NAME) == revisions[3]


def test_rollbacks_in_a_row_go_back_step_by_step(store: AdapterStore, revisions: list[str]) -> None:
    one, two, three, four = revisions
    for revision in (one, four):  # moves of another alias do not count
        store.set_alias(NAME, "canary", revision, actor=WHO)
    assert store.rollback_target(NAME) == three
    assert [store.rollback(NAME, actor=WHO) for _ in range(3)] == [three, two, one]
    with pytest.raises(NothingToRollBack, match=f"before {one}"):
        store.rollback(NAME, actor=WHO)
    assert store.get(AdapterRef(NAME, alias="default")).revision == one
    store.set_alias(NAME, "default", four, actor=WHO)
    assert store.rollback(NAME, actor=WHO) == one


def test_a_revision_pointed_at_twice_is_no_loop(store: AdapterStore, revisions: list[str]) -> None:
    one, *_, four = revisions
    store.set_alias(NAME, "canary", one, actor=WHO)
    store.set_alias(NAME, "canary", four, actor=WHO)
    store.set_alias(NAME, "canary", one, actor=WHO)
    assert [store.rollback(NAME, "canary", actor=WHO) for _ in range(2)] == [four, one]
    with pytest.raises(NothingToRollBack):
        store.rollback(NAME, "canary", actor=WHO)


def test_rollback_undoes_moves_like_a_stack(store: AdapterStore, revisions: list[str]) -> None:
    """Held against a stack, over random moves, and crashes between the log and the alias."""
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


def test_there_is_no_way_back_past_a_removed_alias(store: AdapterStore, revisions: list[str]) -> None:
    store.remove_alias(NAME, "default", actor=WHO)
    store.set_alias(NAME, "default", revisions[0], actor=WHO)
    with pytest.raises(NothingToRollBack):
        store.rollback(NAME, actor=WHO)


# Prune


def test_prune_keeps_the_newest_and_what_is_needed(
    store: AdapterStore, revisions: list[str], tmp_path: Path
) -> None:
    one, two, three, four = revisions
    five = publish(store, tmp_path, 5)
    store.set_alias(NAME, "canary", one, actor=WHO)
    # default: four, before it three; canary: one; the newest: five
    assert store.prune(NAME, keep=1, actor="li", why="space") == [two]
    assert [manifest.revision for manifest in store.revisions(NAME)] == [one, three, four, five]
    assert [(e.action, e.actor, e.from_revision) for e in store.log(NAME)][-1] == ("prune", "li", two)
    assert left_in_staging(store) == []
    assert store.prune(NAME, keep=0, actor=WHO) == [five]
    assert store.rollback(NAME, actor=WHO) == three


@pytest.mark.parametrize("keep", [4, 5, 100])
def test_prune_removes_nothing_while_there_are_few(store: AdapterStore, tmp_path: Path, keep: int) -> None:
    for seed in range(4):
        publish(store, tmp_path, seed)
    assert store.prune(NAME, keep=keep, actor=WHO) == []
    assert len(store.revisions(NAME)) == 4


def test_no_alias_is_rolled_back_to_what_was_pruned(store: AdapterStore, revisions: list[str]) -> None:
    one, two, three, _ = revisions
    assert store.prune(NAME, keep=0, actor=WHO) == [one, two]
    assert store.rollback(NAME, actor=WHO) == three
    with pytest.raises(NothingToRollBack, match=f"pointed at {two} before, which was pruned"):
        store.rollback(NAME, actor=WHO)
    assert store.get(AdapterRef(NAME, alias="default")).revision == three


# Crashes, full disks, and others at the same time


def state(store: AdapterStore, damaged: str | None = None) -> tuple[set[str], dict[str, str]]:
    """The revisions, each proved whole (but for one that is known to be `damaged`), and the aliases."""
    whole = set()
    for manifest in store.revisions(NAME) if NAME in store.names() else []:
        try:
            store.verify(manifest)
            whole.add(manifest.revision)
        except StoreDamaged:
            assert manifest.revision == damaged
    aliases = store.aliases(NAME)
    assert whole.issuperset(aliases.values())
    return whole, aliases


@pytest.mark.parametrize("action", [*killed.ACTIONS, "publish the first", "publish over damage"])
def test_kill_9_at_every_step_leaves_the_old_state_or_the_new(
    tmp_path: Path, start: Start, action: str
) -> None:
    store, damaged = AdapterStore(tmp_path / "store"), None
    store.root.mkdir()
    if action != "publish the first":
        made = [publish(store, tmp_path, seed) for seed in range(4)]
        for revision in made[:3]:
            store.set_alias(NAME, "default", revision, actor=WHO)
        if action == "publish over damage":
            damaged = made[3]
            (store.folder(NAME, damaged) / "adapter_config.json").write_text("{}")
    make_folder(tmp_path / "new", seed=3 if damaged else 4).write()
    verb = action.partition(" ")[0]
    process = start(killed.__file__, tmp_path, verb)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors

    copies = [AdapterStore(tmp_path / str(step)) for step in range(1, len(list(tmp_path.glob("[0-9]*"))) + 1)]
    before, after = state(store, damaged), state(copies[-1])
    assert before != after
    seen = []
    for copy in copies:
        revisions, aliases = state(copy, damaged)
        seen.append((revisions, aliases))
        assert before[0] & after[0] <= revisions <= before[0] | after[0]
        assert aliases in (before[1], after[1])
        if (revisions, aliases) != before:  # nothing happens without a trace
            assert len(copy.log(NAME)) > len(store.log(NAME))
        if (revisions, aliases) != after:
            killed.ACTIONS[verb](copy, tmp_path / "new")
            assert state(copy) == after
        publish(copy, tmp_path, 5)
        assert left_in_staging(copy) == []
    assert seen.count(before) > 1  # killed early enough,
    assert seen.count(after) > 1  # and late enough


def test_many_publishers_at_once_of_the_same_and_of_others(
    store: AdapterStore, tmp_path: Path, start: Start
) -> None:
    """Each of four processes publishes the same six adapters, in an order of its own."""
    folders = [make_folder(tmp_path / f"seed-{seed}", seed).write() for seed in range(6)]
    code = """
import random, sys
from pathlib import Path
from adapters import AdapterStore
store, order, folders = AdapterStore(Path(sys.argv[1])), random.Random(int(sys.argv[2])), sys.argv[3:]
while not store.root.exists(): pass  # all begin together
for folder in order.sample(folders, len(folders)):
    store.publish(Path(folder), "doctor", actor=sys.argv[2])
"""
    processes = [start("-c", code, store.root, str(number), *folders) for number in range(4)]
    time.sleep(0.5)  # for all to be there; were one late, it would race only less
    store.root.mkdir()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    revisions, _ = state(store)
    assert len(revisions) == 6
    assert sorted(entry.to_revision for entry in store.log(NAME)) == sorted(revisions)
    assert left_in_staging(store) == []


def test_an_alias_moves_in_one_step_under_a_reader(
    store: AdapterStore, revisions: list[str], start: Start
) -> None:
    code = """
import os, sys
from pathlib import Path
from adapters import AdapterStore
os.fsync = lambda _: None  # faster, so that there is more to race with
store = AdapterStore(Path(sys.argv[1]))
for move in range(400):
    store.set_alias("doctor", "default", sys.argv[2 + move % 2], actor="writer")
"""
    one, two, *_ = revisions
    store.set_alias(NAME, "default", two, actor=WHO)
    writer = start("-c", code, store.root, one, two)
    seen = []
    while writer.poll() is None:
        seen.append(store.get(AdapterRef(NAME, alias="default")).revision)
    _, errors = writer.communicate()
    assert writer.returncode == 0, errors
    assert set(seen) == {one, two}
    assert sum(a != b for a, b in pairwise(seen)) > 20
    assert len([entry for entry in store.log(NAME) if entry.actor == "writer"]) == 400


def test_readers_do_not_stumble_over_a_prune(
    store: AdapterStore, revisions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revision and an alias that are gone between listing and reading are passed over."""
    read_bytes, read_text = Path.read_bytes, Path.read_text

    def prune_first(path: Path) -> bytes:
        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        store.prune(NAME, keep=0, actor=WHO)
        return read_bytes(path)

    def remove_first(path: Path, **options: str) -> str:
        monkeypatch.setattr(Path, "read_text", read_text)
        path.unlink()
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_bytes", prune_first)
    assert {manifest.revision for manifest in store.revisions(NAME)} == set(revisions[2:])
    monkeypatch.setattr(Path, "read_text", remove_first)
    assert store.aliases(NAME) == {}


def test_everything_is_on_the_disk_before_it_is_seen(
    adapter: Folder, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power, a name must not lead to content that was never written."""
    synced: list[str] = []
    rename, replace = Path.rename, Path.replace

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().relative_to(store.root).as_posix())

    def after_sync(move, *needed: str):
        def call(source: Path, target: Path) -> Path:
            inside = source.relative_to(store.root).as_posix()
            assert {f"{inside}{name}" for name in needed} <= set(synced)
            synced.clear()
            return move(source, target)

        return call

    monkeypatch.setattr(os, "fsync", note)
    files = "/adapter_config.json", "/adapter_model.safetensors", "/manifest.json"
    monkeypatch.setattr(Path, "rename", after_sync(rename, "", *files))
    manifest = store.publish(adapter.write(), NAME, actor=WHO)
    assert synced == [f"{NAME}/revisions", NAME, "."]
    synced.clear()
    monkeypatch.setattr(Path, "replace", after_sync(replace, ""))
    store.set_alias(NAME, "default", manifest.revision, actor=WHO)
    assert synced == [f"{NAME}/aliases", NAME]


def test_a_living_publisher_keeps_its_staging(adapter: Folder, store: AdapterStore, tmp_path: Path) -> None:
    adapter.write()
    with store._staging() as ours:
        (ours / "half").touch()
        publish(store, tmp_path, 1)
        assert left_in_staging(store) == [ours.name]
        assert (ours / "half").exists()
    assert left_in_staging(store) == []


@pytest.mark.parametrize("limit", [0, 100, 600, 1000])
def test_a_disk_that_is_full_leaves_nothing(
    adapter: Folder, store: AdapterStore, start: Start, limit: int
) -> None:
    """No file can grow beyond `limit` bytes: what fails is the config, the tensors or the manifest."""
    code = """
import resource, sys
from pathlib import Path
from adapters import AdapterStore
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    AdapterStore(Path(sys.argv[1])).publish(Path(sys.argv[2]), "doctor", actor="test")
except OSError as error:
    sys.exit(error.errno)
"""
    process = start("-c", code, store.root, adapter.write(), str(limit))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == errno.EFBIG, errors
    assert store.names() == left_in_staging(store) == []
    assert store.log(NAME) == []
    store.publish(adapter.path, NAME, actor=WHO)


@pytest.mark.parametrize("action", [*killed.ACTIONS])
def test_a_log_that_cannot_be_written_stops_every_change(
    store: AdapterStore, revisions: list[str], tmp_path: Path, start: Start, action: str
) -> None:
    """The log is the largest file here: with its size for a limit, only it cannot grow."""
    for _ in range(10):
        store.set_alias(NAME, "canary", revisions[0], actor=WHO, why="x" * 1000)
        store.remove_alias(NAME, "canary", actor=WHO)
    make_folder(tmp_path / "new", seed=9).write()
    before, log = state(store), store.log(NAME)
    code = """
import resource, sys
from pathlib import Path
from adapters import AdapterStore
from tests.adapters.killed import ACTIONS
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    ACTIONS[sys.argv[4]](AdapterStore(Path(sys.argv[1])), Path(sys.argv[3]))
except OSError as error:
    sys.exit(error.errno)
"""
    size = (store.root / NAME / "log.jsonl").stat().st_size
    process = start("-c", code, store.root, str(size + 40), tmp_path / "new", action)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == errno.EFBIG, errors
    assert state(store) == before
    assert store.log(NAME) == log  # the line torn after 40 bytes is left out
    assert left_in_staging(store) == []
    killed.ACTIONS[action](store, tmp_path / "new")
    assert state(store) != before
    assert len(store.log(NAME)) > len(log)
