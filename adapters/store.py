"""The durable home of revisions: immutable folders named by their content, and movable aliases.

    <root>/<name>/revisions/<revision>/   the files of the adapter, manifest.json written last
    <root>/<name>/aliases/<alias>         one line: the revision
    <root>/<name>/log.jsonl               every publish and alias move: when, who, from, to, why
    <root>/.staging/                      publications under way

Readers need no lock. A revision appears by one rename, an alias moves by one replace, so a writer killed
at any step, or two writers at once, leave the old state or the new one. What a killed publisher leaves in
`.staging` is swept by the next. The log comes first: a crash may leave an entry for what did not happen,
and never a change that nobody can trace.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from adapters.errors import AdapterNotFound, AliasMoved, InvalidRef, NothingToRollBack, StoreDamaged
from adapters.manifest import MANIFEST_FILE, PROVENANCE_FILE, Manifest
from adapters.ref import DEFAULT_ALIAS, AdapterRef, check_alias, check_name, check_revision
from adapters.validate import CONFIG_FILE, BaseModelFacts, validate

_REVISIONS = "[0-9a-f]" * 12  # what a revision's folder is called, for glob


class LogEntry(BaseModel):
    """One line of an adapter's log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    action: Literal["publish", "point", "rollback", "unpoint", "prune"]
    actor: str
    alias: str | None = None
    from_revision: str | None = None
    to_revision: str | None = None
    why: str = ""


class AdapterStore:
    """Adapters under one folder, which is made when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # Read

    def names(self) -> list[str]:
        """Names of all adapters with at least one revision."""
        return sorted({path.parts[-3] for path in self.root.glob(f"*/revisions/{_REVISIONS}")})

    def revisions(self, name: str) -> list[Manifest]:
        """All revisions of `name`, oldest first. Raises AdapterNotFound, StoreDamaged."""
        manifests = []
        for revision in self._list(name):
            with suppress(AdapterNotFound):  # pruned while we read
                manifests.append(self.get(AdapterRef(name, revision=revision)))
        if not manifests:
            raise AdapterNotFound(f"there is no adapter {name}")
        return sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.revision))

    def aliases(self, name: str) -> dict[str, str]:
        """Alias to revision. Empty when nothing points at any revision of `name`."""
        found = {}
        for path in sorted((self.root / check_name(name) / "aliases").glob("[!.]*")):
            with suppress(FileNotFoundError):  # removed while we read
                found[path.name] = path.read_text(encoding="utf-8", errors="replace").strip()
        return found

    def get(self, ref: AdapterRef) -> Manifest:
        """The manifest `ref` names. Raises AdapterNotFound, StoreDamaged."""
        revision = self._resolve(ref)
        try:
            text = (self.folder(ref.name, revision) / MANIFEST_FILE).read_bytes()
            manifest = Manifest.model_validate_json(text)
        except FileNotFoundError as error:
            raise AdapterNotFound(f"there is no revision {ref.name}@{revision}") from error
        except ValidationError as error:
            raise StoreDamaged(f"the manifest of {ref.name}@{revision} cannot be read") from error
        said = manifest.name, manifest.revision, _revision(manifest.files)
        if said != (ref.name, revision, revision):
            raise StoreDamaged(f"the manifest of {ref.name}@{revision} is that of something else")
        return manifest

    def folder(self, name: str, revision: str) -> Path:
        """Where the files of a revision lie, or would lie."""
        return self.root / check_name(name) / "revisions" / check_revision(revision)

    def verify(self, manifest: Manifest) -> Path:
        """The folder of a revision, after its files proved to be those that were published.

        Reads every byte, so the files are in the page cache afterwards. Raises StoreDamaged.
        """
        folder = self.folder(manifest.name, manifest.revision)
        for file, digest in manifest.files.items():
            try:
                found = _sha256(folder / file)
            except OSError as error:
                raise StoreDamaged(f"{file} of {manifest.name}@{manifest.revision} cannot be read") from error
            if found != digest:
                raise StoreDamaged(
                    f"{file} of {manifest.name}@{manifest.revision} was changed after it was published: "
                    f"expected SHA-256 {digest[:12]}…, found {found[:12]}…; publish the adapter again"
                )
        return folder

    def log(self, name: str) -> list[LogEntry]:
        """All that happened to `name`, oldest first. A line torn by a crash is left out."""
        path = self.root / check_name(name) / "log.jsonl"
        # Lines of bytes: a crash tears a character too, and text ends lines at U+2028 and others besides.
        lines = path.read_bytes().splitlines() if path.exists() else []
        entries = []
        for line in lines:
            try:
                entries.append(LogEntry.model_validate_json(line))
            except ValidationError:
                continue
        return entries

    # Write

    def publish(
        self,
        folder: Path,
        name: str,
        *,
        actor: str,
        why: str = "",
        base: BaseModelFacts | None = None,
    ) -> Manifest:
        """Validate `folder`, and make a copy of it a revision of `name`.

        The same content published twice is one revision, with the manifest of the first time; damaged
        meanwhile, it is made whole. Raises InvalidRef, InvalidAdapter, OSError (the disk is full, no
        permission); nothing is published then.
        """
        check_name(name)
        wanted = validate(folder, base).files
        with self._staging() as staging:
            copy = staging / "revision"
            copy.mkdir()
            for file in (CONFIG_FILE, PROVENANCE_FILE, MANIFEST_FILE, *wanted):
                if (folder / file).exists():
                    shutil.copyfile(folder / file, copy / file, follow_symlinks=False)
            facts = validate(copy, base)  # the folder may have changed since: what counts is what was copied
            (copy / CONFIG_FILE).write_text(json.dumps(facts.config, indent=2) + "\n", encoding="utf-8")
            files = {file: _sha256(copy / file) for file in sorted([CONFIG_FILE, *facts.files])}
            manifest = Manifest(
                **facts.provenance.model_dump(),
                name=name,
                revision=_revision(files),
                r=facts.r,
                lora_alpha=facts.lora_alpha,
                target_modules=facts.target_modules,
                golden_prompts=facts.golden_prompts,
                files=files,
                created_at=_now(),
            )
            (copy / PROVENANCE_FILE).unlink(missing_ok=True)  # it is part of the manifest now
            (copy / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            _settle(copy)
            target = self.folder(name, manifest.revision)
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(name):
                if first := self._get_whole(name, manifest.revision):
                    return first
                entry = LogEntry(
                    at=_now(), action="publish", actor=actor, to_revision=manifest.revision, why=why
                )
                self._append(name, entry)
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

    def rollback_target(self, name: str, alias: str = DEFAULT_ALIAS) -> str:
        """The revision `alias` pointed at before the present one. Raises AdapterNotFound, NothingToRollBack.

        A rollback takes one move back and is no move itself, so that two in a row go back two steps.
        """
        current = self.aliases(name).get(check_alias(alias))
        if current is None:
            raise AdapterNotFound(f"there is no adapter {name}@{alias}")
        at: str | None = current
        taken_back = 0
        for entry in reversed(self.log(name)):
            if entry.alias != alias or entry.to_revision != at:
                continue  # of another alias, or of a move that a crash kept from happening
            if entry.action == "rollback":
                taken_back += 1
            elif taken_back:
                taken_back -= 1
            elif entry.from_revision is None:
                break
            elif entry.from_revision not in self._list(name):
                raise NothingToRollBack(
                    f"{name}@{alias} pointed at {entry.from_revision} before, which was pruned"
                )
            else:
                return entry.from_revision
            at = entry.from_revision
        raise NothingToRollBack(f"{name}@{alias} has pointed at no revision before {current}")

    def rollback(
        self, name: str, alias: str = DEFAULT_ALIAS, *, actor: str, why: str = "", expected: str | None = None
    ) -> str:
        """Point `alias` back at `rollback_target`, which is returned; AliasMoved if it is not `expected`."""
        with self._locked(name):
            revision = self.rollback_target(name, alias)
            if expected not in (None, revision):
                raise AliasMoved(f"{name}@{alias} was moved by somebody else meanwhile: look, and try again")
            self._point(name, alias, revision, "rollback", actor, why)
        return revision

    def remove_alias(self, name: str, alias: str, *, actor: str, why: str = "") -> None:
        """Point `alias` at nothing. Its revisions stay. Raises AdapterNotFound."""
        with self._locked(name):
            current = self.aliases(name).get(check_alias(alias))
            if current is None:
                raise AdapterNotFound(f"there is no adapter {name}@{alias}")
            entry = LogEntry(
                at=_now(), action="unpoint", actor=actor, alias=alias, from_revision=current, why=why
            )
            self._append(name, entry)
            path = self.root / name / "aliases" / alias
            path.unlink()
            _fsync(path.parent)

    def prune(self, name: str, *, keep: int, actor: str, why: str = "") -> list[str]:
        """Remove all but the `keep` newest revisions and those that aliases or rollbacks need.

        Returns the revisions removed. Raises AdapterNotFound.
        """
        with self._locked(name):
            aliases = self.aliases(name)
            needed = set(aliases.values())
            for alias in aliases:
                try:
                    needed.add(self.rollback_target(name, alias))
                except NothingToRollBack:
                    continue
            manifests = self.revisions(name)
            old = manifests[: max(len(manifests) - keep, 0)]
            doomed = [manifest.revision for manifest in old if manifest.revision not in needed]
            with self._staging() as staging:
                for revision in doomed:
                    entry = LogEntry(at=_now(), action="prune", actor=actor, from_revision=revision, why=why)
                    self._append(name, entry)
                    self.folder(name, revision).rename(staging / revision)
        return doomed

    # Primitives

    def _list(self, name: str) -> list[str]:
        return [path.name for path in (self.root / check_name(name) / "revisions").glob(_REVISIONS)]

    def _resolve(self, ref: AdapterRef) -> str:
        if ref.revision is not None:
            return check_revision(ref.revision)
        revision = self.aliases(ref.name).get(ref.alias or DEFAULT_ALIAS)
        if revision is None:
            raise AdapterNotFound(f"there is no adapter {ref}")
        try:
            return check_revision(revision)
        except InvalidRef as error:
            raise StoreDamaged(f"{ref} points at no revision: point it at one again") from error

    def _get_whole(self, name: str, revision: str) -> Manifest | None:
        try:
            manifest = self.get(AdapterRef(name, revision=revision))
            self.verify(manifest)
        except (AdapterNotFound, StoreDamaged):
            return None
        return manifest

    def _point(
        self, name: str, alias: str, revision: str, action: Literal["point", "rollback"], actor: str, why: str
    ) -> None:
        current = self.aliases(name).get(alias)
        if current == revision:
            return
        entry = LogEntry(
            at=_now(), action=action, actor=actor, alias=alias,
            from_revision=current, to_revision=revision, why=why,
        )  # fmt: skip
        self._append(name, entry)
        folder = self.root / name / "aliases"
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{alias}"
        temporary.write_text(revision + "\n")
        _fsync(temporary)
        temporary.replace(folder / alias)
        _fsync(folder, folder.parent)

    def _put(self, folder: Path, target: Path) -> None:
        """Move a settled folder to its place. The folders above may be new too."""
        folder.rename(target)
        _fsync(target.parent, target.parent.parent, self.root)

    def _append(self, name: str, entry: LogEntry) -> None:
        path = self.root / name / "log.jsonl"
        line = entry.model_dump_json() + "\n"
        with path.open("a+", encoding="utf-8") as file:
            # A line torn by a crash must not swallow this one.
            if file.tell() and not path.read_bytes().endswith(b"\n"):
                line = "\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One writer of an adapter at a time. Raises AdapterNotFound, so that a wrong name makes no folder."""
        folder = self.root / check_name(name)
        if not folder.is_dir():
            raise AdapterNotFound(f"there is no adapter {name}")
        with _flock(folder / ".lock"):
            yield

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder of our own, gone afterwards. Sweeps what dead publishers left."""
        top = self.root / ".staging"
        top.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with _flock(top / ".lock"):  # or a folder just made would look abandoned until it is locked
                for left in top.glob("[!.]*"):
                    _remove_if_abandoned(left)
                folder = Path(tempfile.mkdtemp(dir=top))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)  # what stays, the next one sweeps
                stack.enter_context(_flock(folder / ".lock"))
            yield folder


@contextmanager
def _flock(path: Path) -> Iterator[None]:
    """Hold `path` alone, over threads and processes; freed by the system if its holder dies."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError), (folder / ".lock").open("a") as lock:  # its publisher lives, or has just ended
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Make files readable by every user (safetensors writes 0600) and durable."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
        _fsync(path)
    _fsync(folder)


def _fsync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _revision(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)
