"""The adapter store: immutable revision folders named by their content, and movable aliases.

    <root>/<name>/revisions/<revision>/   the files of the adapter, manifest.json written last
    <root>/<name>/aliases/<alias>         one line: the revision
    <root>/<name>/traffic.json            the shares of canary and shadow, if any
    <root>/<name>/log.jsonl               every publish and alias move: when, who, from, to, why
    <root>/.staging/                      publications in progress

Readers need no lock. A revision appears by one rename and an alias moves by one replace, so a killed writer, or two
writers at once, leave the old state or the new one. The next publisher removes what a killed one left in `.staging`.
The log is written first: a crash may leave an entry for a change that did not happen, but never a change without an
entry.
"""

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapters.durable import flock, fsync, remove_if_abandoned, replace_text, settle, sha256
from adapters.errors import AdapterNotFound, AliasMoved, InvalidRef, NothingToRollBack, StoreDamaged
from adapters.log import Action, LogEntry, append, read_log, way_back
from adapters.manifest import MANIFEST_FILE, PROVENANCE_FILE, Manifest, revision_of
from adapters.ref import (
    DEFAULT_ALIAS,
    AdapterRef,
    check_alias,
    check_name,
    check_revision,
    folder_name,
    name_of,
)
from adapters.traffic import CANARY, SHADOW, Traffic
from adapters.validate import CONFIG_FILE, BaseModelFacts, validate

_REVISIONS = "[0-9a-f]" * 12  # glob pattern of revision folders


class AdapterStore:
    """The adapters in one folder, which is created on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # Read

    def names(self) -> list[str]:
        """Return the names of all adapters with at least one revision."""
        return self._names(f"revisions/{_REVISIONS}")

    def revisions(self, name: str) -> list[Manifest]:
        """Return all revisions of `name`, oldest first. Raises AdapterNotFound, StoreDamaged."""
        manifests = []
        for revision in self._list(name):
            with suppress(AdapterNotFound):  # pruned while we read
                manifests.append(self.get(AdapterRef(name, revision=revision)))
        if not manifests:
            raise AdapterNotFound(f"there is no adapter {name}")
        return sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.revision))

    def aliases(self, name: str) -> dict[str, str]:
        """Return the revision of each alias of `name`; empty if there is no alias."""
        found = {}
        for path in sorted((self._home(name) / "aliases").glob("[!.]*")):
            with suppress(FileNotFoundError, IsADirectoryError):  # removed while we read, or not an alias
                found[path.name] = path.read_text(encoding="utf-8", errors="replace").strip()
        return found

    def pointed(self) -> dict[tuple[str, str], str]:
        """Return the revision of every alias of every adapter, by (name, alias)."""
        found: dict[tuple[str, str], str] = {}
        for name in self._names("aliases/[!.]*"):
            found |= {(name, alias): to for alias, to in self.aliases(name).items()}
        return found

    def get(self, ref: AdapterRef) -> Manifest:
        """Return the manifest of `ref`. Raises AdapterNotFound, StoreDamaged."""
        revision = self._resolve(ref)
        try:
            text = (self.folder(ref.name, revision) / MANIFEST_FILE).read_bytes()
            manifest = Manifest.model_validate_json(text)
        except FileNotFoundError as error:
            raise AdapterNotFound(f"there is no revision {ref.name}@{revision}") from error
        except (ValidationError, OSError) as error:
            raise StoreDamaged(f"the manifest of {ref.name}@{revision} cannot be read") from error
        said = manifest.name, manifest.revision, revision_of(manifest.files, manifest)
        if said != (ref.name, revision, revision):
            raise StoreDamaged(f"the manifest of {ref.name}@{revision} belongs to another revision")
        return manifest

    def folder(self, name: str, revision: str) -> Path:
        """Return the folder of a revision, which may not exist."""
        return self._home(name) / "revisions" / check_revision(revision)

    def verify(self, manifest: Manifest) -> Path:
        """Check that the files of a revision are those published, and return its folder.

        Reads every byte, so the files are in the page cache afterwards. Raises StoreDamaged.
        """
        folder = self.folder(manifest.name, manifest.revision)
        for file, digest in manifest.files.items():
            try:
                found = sha256(folder / file)
            except OSError as error:
                raise StoreDamaged(f"{file} of {manifest.ref} cannot be read") from error
            if found != digest:
                raise StoreDamaged(
                    f"{file} of {manifest.ref} was changed after it was published: "
                    f"expected SHA-256 {digest[:12]}…, found {found[:12]}…; publish the adapter again"
                )
        return folder

    def log(self, name: str) -> list[LogEntry]:
        """Return the log of `name`, oldest entry first. Skips a line torn by a crash."""
        return read_log(self._home(name) / "log.jsonl")

    def traffic(self, name: str) -> Traffic:
        """Return the canary and shadow shares of `name`. Raises StoreDamaged."""
        try:
            return Traffic.model_validate_json((self._home(name) / "traffic.json").read_bytes())
        except FileNotFoundError:
            return Traffic()
        except (ValidationError, OSError) as error:
            raise StoreDamaged(f"the traffic shares of {name} cannot be read: set them again") from error

    # Write

    def publish(
        self,
        folder: Path,
        name: str,
        *,
        actor: str,
        why: str = "",
        source: str | None = None,
        base: BaseModelFacts | None = None,
    ) -> Manifest:
        """Validate `folder` and copy it into the store as a revision of `name`. `source`: where it was fetched from.

        Publishing the same content again returns the existing revision and its first manifest, and repairs damaged
        files. Raises InvalidRef, InvalidAdapter, OSError (disk full, no permission); then nothing is published.
        """
        check_name(name)
        wanted = validate(folder, base).files
        with self._staging() as staging:
            copy = staging / "revision"
            copy.mkdir()
            for file in (CONFIG_FILE, PROVENANCE_FILE, MANIFEST_FILE, *wanted):
                if (folder / file).exists():
                    shutil.copyfile(folder / file, copy / file, follow_symlinks=False)
            facts = validate(copy, base)  # the folder may have changed while it was copied
            (copy / CONFIG_FILE).write_text(json.dumps(facts.config, indent=2) + "\n", encoding="utf-8")
            files = {file: sha256(copy / file) for file in sorted([CONFIG_FILE, *facts.files])}
            manifest = Manifest(
                **facts.provenance.model_dump(),
                name=name,
                revision=revision_of(files, facts.provenance),
                r=facts.r,
                lora_alpha=facts.lora_alpha,
                target_modules=facts.target_modules,
                golden_prompts=facts.golden_prompts,
                files=files,
                created_at=datetime.now(UTC),
            )
            (copy / PROVENANCE_FILE).unlink(missing_ok=True)  # now part of the manifest
            (copy / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            settle(copy)
            target = self.folder(name, manifest.revision)
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(name):
                if first := self._get_whole(name, manifest.revision):
                    return first
                self._append(name, "publish", actor, why, to_revision=manifest.revision, source=source)
                if target.exists():
                    target.rename(staging / "damaged")
                self._put(copy, target)
        return manifest

    def set_alias(self, name: str, alias: str, revision: str, *, actor: str, why: str = "") -> None:
        """Point `alias` at an existing revision of `name`. Raises AdapterNotFound, InvalidRef."""
        check_alias(alias)
        with self._locked(name):
            self.get(AdapterRef(name, revision=check_revision(revision)))
            self._point(name, alias, revision, "point", actor, why)

    def previous(self, name: str, alias: str = DEFAULT_ALIAS) -> str:
        """Return the previous revision of `alias`. Raises AdapterNotFound, NothingToRollBack."""
        current = self._current(name, alias)
        revisions = way_back(self.log(name), alias, current)
        if not revisions:
            raise NothingToRollBack(f"{name}@{alias} has no previous revision before {current}")
        if revisions[0] not in self._list(name):
            raise NothingToRollBack(f"the previous revision of {name}@{alias}, {revisions[0]}, was pruned")
        return revisions[0]

    def rollback(
        self,
        name: str,
        alias: str = DEFAULT_ALIAS,
        *,
        to: str | None = None,
        actor: str,
        why: str = "",
        expected: str | None = None,
    ) -> str:
        """Point `alias` back at `to`, or at its previous revision; return the revision.

        Raises AdapterNotFound, NothingToRollBack, and AliasMoved if that revision is not `expected`.
        """
        with self._locked(name):
            self._current(name, alias)
            if to is None:
                revision = self.previous(name, alias)
            else:
                revision = self.get(AdapterRef(name, revision=check_revision(to))).revision
            if expected not in (None, revision):
                raise AliasMoved(f"{name}@{alias} was moved concurrently: check its revision, then retry")
            self._point(name, alias, revision, "rollback", actor, why)
        return revision

    def remove_alias(self, name: str, alias: str, *, actor: str, why: str = "") -> None:
        """Remove `alias` and its share of the traffic. Its revisions stay. Raises AdapterNotFound."""
        with self._locked(name):
            self._remove_alias(name, alias, actor, why)

    def split(self, name: str, alias: str, percent: float, *, actor: str, why: str = "") -> None:
        """Set the share of the requests for `name` that `alias` (`canary` or `shadow`) gets; 0 removes it.

        Raises AdapterNotFound if the alias does not exist, ValueError for an invalid percentage.
        """
        with self._locked(name):
            self._current(name, alias)
            self._split(name, alias, percent, actor, why)

    def promote(self, name: str, *, actor: str, why: str = "", expected: str | None = None) -> str:
        """Point `default` at the canary's revision and end the canary; return the revision.

        After a kill between the two steps both aliases point at the revision, and promoting again ends the canary.
        Raises AdapterNotFound, and AliasMoved if that revision is not `expected`.
        """
        with self._locked(name):
            revision = self._current(name, CANARY)
            if expected not in (None, revision):
                raise AliasMoved(f"{name}@{CANARY} was moved concurrently: check its revision, then retry")
            self._point(name, DEFAULT_ALIAS, revision, "promote", actor, why)
            self._remove_alias(name, CANARY, actor, why)
        return revision

    def prune(self, name: str, *, keep: int, actor: str, why: str = "") -> list[str]:
        """Remove old revisions, except the `keep` newest and those that aliases, rollbacks or engines need.

        Returns the removed revisions. Raises AdapterNotFound.
        """
        with self._locked(name), self._staging() as staging:
            aliases = self.aliases(name)
            needed = set(aliases.values())
            for alias in aliases:
                with suppress(NothingToRollBack):
                    needed.add(self.previous(name, alias))
            manifests = self.revisions(name)
            old = manifests[: max(len(manifests) - keep, 0)]
            pruned = []
            for revision in (manifest.revision for manifest in old if manifest.revision not in needed):
                folder = self.folder(name, revision)
                with (folder / MANIFEST_FILE).open("rb") as held:
                    try:
                        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue  # an engine holds it
                    self._append(name, "prune", actor, why, from_revision=revision)
                    folder.rename(staging / revision)
                    pruned.append(revision)
        return pruned

    @contextmanager
    def hold(self, manifest: Manifest) -> Iterator[Path]:
        """Keep a revision from being pruned by any process; yield its folder.

        Raises AdapterNotFound. The system releases the hold if the holder dies.
        """
        folder = self.folder(manifest.name, manifest.revision)
        with ExitStack() as stack:
            try:
                file = stack.enter_context((folder / MANIFEST_FILE).open("rb"))
                fcntl.flock(file, fcntl.LOCK_SH)
                if not (folder / MANIFEST_FILE).exists():  # pruned while we waited
                    raise FileNotFoundError
            except FileNotFoundError as error:
                raise AdapterNotFound(f"there is no revision {manifest.ref}") from error
            yield folder

    # Primitives

    def _home(self, name: str) -> Path:
        """Return the folder of an adapter. Raises InvalidRef."""
        return self.root / folder_name(name)

    def _names(self, holding: str) -> list[str]:
        """Return the adapters whose folder has an entry that matches the glob pattern `holding`."""
        names = set()
        for folder in {path.parts[-3] for path in self.root.glob(f"[!.]*/{holding}")}:
            with suppress(InvalidRef):  # not a folder of the store
                names.add(name_of(folder))
        return sorted(names)

    def _list(self, name: str) -> list[str]:
        return [path.name for path in (self._home(name) / "revisions").glob(_REVISIONS)]

    def _resolve(self, ref: AdapterRef) -> str:
        if ref.revision is not None:
            return check_revision(ref.revision)
        revision = self.aliases(ref.name).get(ref.alias or DEFAULT_ALIAS)
        if revision is None:
            raise AdapterNotFound(f"there is no adapter {ref}")
        try:
            return check_revision(revision)
        except InvalidRef as error:
            raise StoreDamaged(f"{ref} points at no valid revision: point it at one again") from error

    def _get_whole(self, name: str, revision: str) -> Manifest | None:
        try:
            manifest = self.get(AdapterRef(name, revision=revision))
            self.verify(manifest)
        except (AdapterNotFound, StoreDamaged):
            return None
        return manifest

    def _current(self, name: str, alias: str) -> str:
        current = self.aliases(name).get(check_alias(alias))
        if current is None:
            raise AdapterNotFound(f"there is no adapter {name}@{alias}")
        return current

    def _point(self, name: str, alias: str, revision: str, action: Action, actor: str, why: str) -> None:
        current = self.aliases(name).get(alias)
        if current == revision:
            return
        self._append(name, action, actor, why, alias=alias, from_revision=current, to_revision=revision)
        replace_text(self._home(name) / "aliases" / alias, revision + "\n")

    def _remove_alias(self, name: str, alias: str, actor: str, why: str) -> None:
        current = self._current(name, alias)
        if alias in (CANARY, SHADOW):
            self._split(name, alias, 0, actor, why)
        self._append(name, "unpoint", actor, why, alias=alias, from_revision=current)
        path = self._home(name) / "aliases" / alias
        path.unlink()
        fsync(path.parent)

    def _split(self, name: str, alias: str, percent: float, actor: str, why: str) -> None:
        before = self.traffic(name)
        after = Traffic.model_validate({**before.model_dump(), alias: percent})
        if after == before:
            return
        self._append(name, "split", actor, why, alias=alias, percent=percent)
        replace_text(self._home(name) / "traffic.json", after.model_dump_json() + "\n")

    def _put(self, folder: Path, target: Path) -> None:
        """Move a synced folder to its place. The folders above may also be new."""
        folder.rename(target)
        fsync(target.parent, target.parent.parent, self.root)

    def _append(self, name: str, action: Action, actor: str, why: str, **what: Any) -> None:
        entry = LogEntry(at=datetime.now(UTC), action=action, actor=actor, why=why, **what)
        append(self._home(name) / "log.jsonl", entry)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Allow one writer of an adapter at a time. Raises AdapterNotFound; a wrong name creates no folder."""
        folder = self._home(name)
        if not folder.is_dir():
            raise AdapterNotFound(f"there is no adapter {name}")
        with flock(folder / ".lock"):
            yield

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """Yield a temporary folder of our own. Removes the folders of dead publishers."""
        top = self.root / ".staging"
        top.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with flock(top / ".lock"):  # a new folder would look abandoned until it is locked
                for left in top.glob("[!.]*"):
                    remove_if_abandoned(left)
                folder = Path(tempfile.mkdtemp(dir=top))
                stack.callback(
                    shutil.rmtree, folder, ignore_errors=True
                )  # the next publisher removes leftovers
                stack.enter_context(flock(folder / ".lock"))
            yield folder
