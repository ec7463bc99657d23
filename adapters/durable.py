"""Files that are there after a crash, and locks that the system frees when their holder dies."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def flock(path: Path) -> Iterator[None]:
    """Hold `path` alone, over threads and processes; freed by the system if its holder dies."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_if_abandoned(folder: Path) -> None:
    """Remove a folder unless somebody holds its `.lock`."""
    with suppress(OSError), (folder / ".lock").open("a") as lock:  # its owner lives, or has just ended
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def settle(folder: Path) -> None:
    """Make files readable by every user (safetensors writes 0600) and durable."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
        fsync(path)
    fsync(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a small file at once or not at all. Its folder is made if need be."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent, path.parent.parent)


def fsync(*paths: Path) -> None:
    """Make files, or the entries of folders, durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
