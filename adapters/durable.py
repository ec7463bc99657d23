"""Files that survive a crash, and locks that the system releases when their holder dies."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def flock(path: Path) -> Iterator[None]:
    """Lock `path` exclusively across threads and processes; the system releases the lock if its holder dies."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_if_abandoned(folder: Path) -> None:
    """Remove a folder unless its `.lock` is held."""
    with (
        suppress(OSError),
        (folder / ".lock").open("a") as lock,
    ):  # the owner is alive, or has just removed it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def settle(folder: Path) -> None:
    """Make the files of a folder durable and readable by every user (safetensors writes 0600)."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
        fsync(path)
    fsync(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a small file atomically. Creates its folder if needed."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent, path.parent.parent)


def fsync(*paths: Path) -> None:
    """Sync files, or the entries of folders, to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
