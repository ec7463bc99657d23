"""Fetches from an object store (a folder or an archive) or from a web server (an archive)."""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    NoCredentialsError,
    PartialCredentialsError,
)

from app.fetch.download import client, download
from app.fetch.source import Source, is_listed
from app.fetch.transfer import CONNECT_SECONDS, SILENCE_SECONDS, Transfer, TransferFailed, wanted

_RETRIES = 3
_CREDENTIALS = {
    "s3": "give the service an AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY that may read and list the bucket",
    "gs": "give the service GOOGLE_APPLICATION_CREDENTIALS that may read and list the bucket",
}


def fetch_web(source: Source, transfer: Transfer, allowed: Sequence[str]) -> str:
    """Download and unpack an archive from a web server, and return its source. Raises TransferFailed."""

    def check_hop(url: str) -> None:
        # A redirect may carry a signature in its query, so only the rest of the URL is checked and shown.
        if not is_listed(urlsplit(url)._replace(query="", fragment="").geturl(), allowed):
            parts = urlsplit(url)
            raise TransferFailed(
                f"the source redirects to {parts.scheme}://{parts.hostname}/, which is not an allowed source: "
                "add it to XINGLIN_SOURCES"
            )

    archive = transfer.staging / "archive"
    with client(check_hop) as session:
        download(
            session,
            source.url,
            archive,
            transfer,
            headers={},
            size=None,
            credentials="only public files can be fetched over HTTP",
        )
    _unpack(archive, transfer)
    return source.url


def fetch_objects(source: Source, transfer: Transfer) -> str:
    """Download a folder or an archive from an object store, and return its source. Raises TransferFailed."""
    try:
        _fetch_objects(source, transfer)
    except ImportError as error:
        raise TransferFailed("gs:// needs another package: pip install gcsfs") from error
    except FileNotFoundError as error:
        raise TransferFailed("the source has no such bucket, folder or file: check its name") from error
    except (PermissionError, NoCredentialsError, PartialCredentialsError) as error:
        raise TransferFailed(f"the source refuses access: {_CREDENTIALS[source.scheme]}") from error
    except (OSError, BotoCoreError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TransferFailed("the transfer was interrupted: retry later") from error
    return source.url


def _fetch_objects(source: Source, transfer: Transfer) -> None:
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if source.scheme == "s3":
        options["max_concurrency"] = 1  # pieces of 64 KiB; by default, ten of 50 MiB are in memory at once
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENCE_SECONDS,
            "retries": {"max_attempts": _RETRIES},
        }
    files = fsspec.filesystem(source.scheme, **options)
    place = f"{source.place}/{source.path}"
    if source.is_archive:
        size = files.info(place)["size"]
        transfer.expect(size)
        _get(files, place, transfer.staging / "archive", size, transfer)
        _unpack(transfer.staging / "archive", transfer)
        return
    entries = {
        entry["name"].removeprefix(place): entry["size"]
        for entry in files.ls(place, detail=True)
        if entry["type"] == "file" and entry["name"].startswith(place)
    }
    names = wanted(set(entries))
    transfer.expect(sum(entries[name] for name in names))
    for name in names:
        _get(files, place + name, transfer.folder / name, entries[name], transfer)


def _get(files: Any, key: str, target: Path, size: int, transfer: Transfer) -> None:
    files.get_file(key, str(target), callback=_Count(transfer))
    if target.stat().st_size != size:
        raise TransferFailed("the file changed during the download: retry")


class _Count(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Counts the bytes that fsspec reports."""

    def __init__(self, transfer: Transfer) -> None:
        super().__init__()
        self._transfer = transfer

    def relative_update(self, inc: int = 1) -> None:
        self._transfer.add(inc)


def _unpack(archive: Path, transfer: Transfer) -> None:
    from adapters.archive import unpack  # noqa: PLC0415

    unpack(archive, transfer.folder, max_bytes=transfer.max_bytes)
