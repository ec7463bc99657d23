"""adapters/store.py: kills, full disks and concurrent writers leave the old state or the new one."""

import errno
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from adapters import AdapterRef, AdapterStore, StoreDamaged, Traffic
from tests.adapters import killed
from tests.adapters.conftest import Start
from tests.adapters.folders import NAME, WHO, Folder, left_in_staging, make_folder, publish


def state(store: AdapterStore, damaged: str | None = None) -> tuple[set[str], tuple[dict[str, str], Traffic]]:
    """Return the undamaged revisions, the aliases and their shares; only `damaged` may be damaged."""
    whole = set()
    for manifest in store.revisions(NAME) if NAME in store.names() else []:
        try:
            store.verify(manifest)
            whole.add(manifest.revision)
        except StoreDamaged:
            assert manifest.revision == damaged
    aliases = store.aliases(NAME)
    assert whole.issuperset(aliases.values())
    return whole, (aliases, store.traffic(NAME))


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
        if action in ("split", "promote"):
            store.set_alias(NAME, "canary", made[3], actor=WHO)
            store.split(NAME, "canary", 10, actor=WHO)
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
        if action == "promote" and aliases not in (before[1], after[1]):
            pointed, _ = aliases  # between the two steps, both point at the new one
            assert pointed == {"default": made[3], "canary": made[3]}
        else:
            assert aliases in (before[1], after[1])
        if (revisions, aliases) != before:  # every change is logged
            assert len(copy.log(NAME)) > len(store.log(NAME))
        if (revisions, aliases) != after:
            killed.ACTIONS[verb](copy, tmp_path / "new")
            assert state(copy) == after
        publish(copy, tmp_path, 5)
        assert left_in_staging(copy) == []
    assert seen.count(before) > 1  # some kills were early enough
    assert seen.count(after) > 1  # and some late enough


def test_concurrent_publishers_of_the_same_adapters(
    store: AdapterStore, tmp_path: Path, start: Start
) -> None:
    """Four processes publish the same six adapters, each in its own order."""
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
    time.sleep(0.5)  # until all have started; a late one would only race less
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
    assert sum(a != b for a, b in pairwise(seen)) > 5
    assert len([entry for entry in store.log(NAME) if entry.actor == "writer"]) == 400


def test_readers_survive_a_prune(
    store: AdapterStore, revisions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers skip a revision or alias that is removed between listing and reading."""
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


def test_everything_is_synced_before_it_is_visible(
    adapter: Folder, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss, no name may point at content that was never written."""
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
def test_a_full_disk_leaves_no_files(adapter: Folder, store: AdapterStore, start: Start, limit: int) -> None:
    """No file can grow beyond `limit` bytes, so writing the config, the tensors or the manifest fails."""
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
def test_no_change_without_a_log_entry(
    store: AdapterStore, revisions: list[str], tmp_path: Path, start: Start, action: str
) -> None:
    """The log is the largest file here: with its size as the limit, only the log cannot grow."""
    for _ in range(10):
        store.set_alias(NAME, "canary", revisions[0], actor=WHO, why="x" * 1000)
        store.remove_alias(NAME, "canary", actor=WHO)
    if action in ("split", "promote"):
        store.set_alias(NAME, "canary", revisions[0], actor=WHO)
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
