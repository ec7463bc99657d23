"""adapters/store.py: publishing, reading and verifying revisions."""

import json
import os
import shutil
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
from tests.adapters.folders import BASE, GOLDEN, NAME, WHO, Folder, left_in_staging, publish

# Publish


def test_published_revision_is_read_back(adapter: Folder, store: AdapterStore) -> None:
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


def test_published_files_are_readable_by_every_user(adapter: Folder, store: AdapterStore) -> None:
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
    assert second == first  # with the first provenance
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


def test_the_config_of_a_revision_keeps_its_patterns_in_order(adapter: Folder, store: AdapterStore) -> None:
    """The first match wins, so another order would scale the modules differently."""
    adapter.config["alpha_pattern"] = {"self_attn.q_proj": 2, "q_proj": 32, "down_proj": 1}
    folder = store.verify(store.publish(adapter.write(), NAME, actor=WHO))
    kept = json.loads((folder / "adapter_config.json").read_text())
    assert list(kept["alpha_pattern"].items()) == list(adapter.config["alpha_pattern"].items())


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


def test_a_revision_in_the_store_validates_by_its_manifest(reward: Folder, store: AdapterStore) -> None:
    """Base model and task come from the manifest, as a revision has no provenance.json."""
    reward.provenance["base_fingerprint"] = "f" * 16
    folder = store.verify(store.publish(reward.write(), NAME, actor=WHO))
    assert validate(folder).provenance.task == "reward"
    with pytest.raises(InvalidAdapter, match="fingerprint"):
        validate(folder, BASE)


def test_refused_adapters_leave_no_files(adapter: Folder, store: AdapterStore, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/x", "A B", "a" * 10_000])
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
        (lambda path: path.write_bytes(b"garbage"), "truncated or not a safetensors file"),
    ],
    ids=["link", "garbage"],
)
def test_the_folder_may_change_while_it_is_copied(
    adapter: Folder, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, slip_in, problem: str
) -> None:
    """The copy is validated, not the folder."""
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


def test_missing_adapters_and_revisions(store: AdapterStore, revisions: list[str]) -> None:
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
        lambda: store.previous("nobody"),
        lambda: store.prune("nobody", keep=0, actor=WHO),
    ):
        with pytest.raises(AdapterNotFound):
            call()
    assert not (store.root / "nobody").exists()  # a wrong name leaves no trace
    assert store.aliases(NAME) == {"default": revisions[-1]}


def test_a_name_without_revisions_is_no_adapter(store: AdapterStore, tmp_path: Path) -> None:
    """A kill after the folder is created, or pruning all revisions, leaves such a name."""
    publish(store, tmp_path, 0)
    assert len(store.prune(NAME, keep=0, actor=WHO)) == 1
    assert store.names() == []


def test_unknown_files_in_the_store_are_ignored(store: AdapterStore, revisions: list[str]) -> None:
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
    assert store.rollback(NAME, actor=WHO) == revisions[2]  # rollback works with a damaged manifest
    assert publish(store, tmp_path, 3) == revisions[3]
    assert len(store.revisions(NAME)) == 4


@pytest.mark.parametrize("content", [b"", b"../../etc", b"\xff", b"default"])
def test_an_alias_file_that_holds_no_revision(
    store: AdapterStore, revisions: list[str], content: bytes
) -> None:
    """It does not affect other aliases, and can be pointed again."""
    store.set_alias(NAME, "canary", revisions[1], actor=WHO)
    (store.root / NAME / "aliases" / "default").write_bytes(content)
    with pytest.raises(StoreDamaged, match="doctor@default points at no valid revision: point it"):
        store.get(AdapterRef(NAME, alias="default"))
    assert store.aliases(NAME).keys() == {"default", "canary"}
    assert store.get(AdapterRef(NAME, alias="canary")).revision == revisions[1]
    store.set_alias(NAME, "default", revisions[0], actor=WHO)
    assert store.get(AdapterRef(NAME, alias="default")).revision == revisions[0]
    with pytest.raises(NothingToRollBack):
        store.rollback(NAME, actor=WHO)
    assert store.prune(NAME, keep=0, actor=WHO) == revisions[2:]
