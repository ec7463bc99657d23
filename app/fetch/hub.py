"""Fetches from a Hugging Face hub: resolves the revision to a commit, and downloads only that commit's files."""

import hashlib
import re
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils._headers import build_hf_headers

from app.fetch.download import check_status, client, download, retried
from app.fetch.source import Source
from app.fetch.transfer import CONNECT_SECONDS, SILENCE_SECONDS, Transfer, TransferFailed, wanted

_CREDENTIALS = "check the name, and set HF_TOKEN for the service if the repository is private or gated"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(source: Source, transfer: Transfer) -> str:
    """Download the adapter and return its source with the commit. Raises TransferFailed."""
    is_plain = urlsplit(huggingface_hub.constants.ENDPOINT).scheme == "http"

    def check_hop(url: str) -> None:
        if urlsplit(url).scheme != "https" and not is_plain:
            raise TransferFailed("the hub redirects to an unencrypted connection")

    with client(check_hop) as session:
        huggingface_hub.set_client_factory(lambda: session)
        info = retried(lambda: _info(source))
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise TransferFailed("the hub did not report the commit of the revision")
        if info.id != source.place:
            raise TransferFailed(f"the hub knows this repository as {info.id}: use that name")
        folder = f"{source.path}/" if source.path else ""
        found = {file.rfilename.removeprefix(folder): file for file in info.siblings or []}
        files = [
            found[name]
            for name in wanted({name for name, file in found.items() if file.rfilename == folder + name})
        ]
        sizes = [file.size for file in files]
        transfer.expect(None if None in sizes else sum(size for size in sizes if size is not None))
        for file in files:
            target = transfer.folder / file.rfilename.removeprefix(folder)
            url = huggingface_hub.hf_hub_url(source.place, file.rfilename, revision=commit)
            download(
                session,
                url,
                target,
                transfer,
                headers=build_hf_headers(),
                size=file.size,
                credentials=_CREDENTIALS,
            )
            if _sha256(file) is not None:
                with target.open("rb") as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() != _sha256(file):
                        raise TransferFailed(
                            "the file does not have the digest that the hub announced: retry"
                        )
    return Source("hf", source.place, source.path, commit).url


def _info(source: Source) -> ModelInfo:
    try:
        return huggingface_hub.HfApi().model_info(
            source.place,
            revision=source.revision,
            files_metadata=True,
            timeout=CONNECT_SECONDS + SILENCE_SECONDS,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 404:
            raise TransferFailed("the hub has no such repository or revision: " + _CREDENTIALS) from error
        check_status(status, _CREDENTIALS)
        raise


def _sha256(file: RepoSibling) -> str | None:
    return file.lfs.sha256 if file.lfs is not None else None
