"""Sources: parses the URLs that clients send into one canonical form, and checks the operator's allow-list.

Parsing is strict: a URL that two libraries could read differently is rejected, not repaired.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from app.errors import BadRequest, Code, PathNotAllowed

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")

_MAX_LENGTH = 2048
_DEFAULT_PORTS = {"https": 443, "http": 80}
_SCHEMES = ("hf", "s3", "gs", "https", "http")
_HUB = re.compile(r"(?P<place>[^/@]+/[^/@]+)(?:@(?P<revision>refs/pr/\d+|[^/@]+))?(?:/(?P<path>[^@]*))?")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"refs/pr/\d{1,9}|[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_HOST = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*"
)
_LAST_LABEL_OF_AN_ADDRESS = re.compile(r"(?:.*\.)?(?:\d+|0x[0-9a-f]*)")
_PORT = re.compile(r"[1-9]\d{0,4}")
_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()+,;=:@/ -]|%[0-9A-Fa-f]{2})*")


@dataclass(frozen=True)
class Source:
    """A place to fetch from, in canonical form."""

    scheme: str
    place: str
    """The repository, the bucket, or the host with its port unless that is the default."""
    path: str
    """The path, without a leading slash."""
    revision: str | None = None
    """A repository's commit, branch or tag; None for the main branch."""

    @property
    def url(self) -> str:
        """The whole URL, which never holds a secret."""
        revision = f"@{self.revision}" if self.revision else ""
        separator = "/" if self.path or self.scheme != "hf" else ""
        return f"{self.scheme}://{self.place}{revision}{separator}{self.path}"

    @property
    def is_archive(self) -> bool:
        """Whether the source is a single archive to unpack."""
        return self.scheme != "hf" and self.path.lower().endswith(ARCHIVE_SUFFIXES)


def parse_source(text: str, allowed: Sequence[str]) -> Source:
    """Parse the source that a client sent. `allowed`: URL prefixes, as in XINGLIN_SOURCES.

    Raises BadRequest for an invalid source, PathNotAllowed if no prefix covers it, ValueError for an invalid prefix.
    """
    try:
        source = _parse(text)
        if source.scheme in _DEFAULT_PORTS and not source.is_archive:
            raise ValueError(f"must name an archive: a file that ends in {', '.join(ARCHIVE_SUFFIXES)}")
    except ValueError as error:
        raise BadRequest(f"source: {error}", code=Code.INVALID_SOURCE, param="source") from error
    if not is_listed(source.url, allowed):
        raise PathNotAllowed(
            f"source: {source.scheme}://{source.place}/ is not an allowed source: add it to XINGLIN_SOURCES",
            param="source",
        )
    return source


def is_listed(url: str, allowed: Sequence[str]) -> bool:
    """Whether one of the prefixes covers `url`. Raises ValueError for an invalid prefix."""
    try:
        source = _parse(url)
    except ValueError:
        return False
    return any(_covers(prefix, source) for prefix in map(_prefix, allowed))


def checked_prefixes(allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the prefixes unchanged. Raises ValueError for an invalid one."""
    for prefix in allowed:
        _prefix(prefix)
    return tuple(allowed)


def _prefix(text: str) -> Source:
    scheme, separator, rest = text.partition("://")
    try:
        if separator and scheme in _SCHEMES and not rest:
            return Source(scheme, "", "")
        if scheme == "hf" and _HUB_NAME.fullmatch(rest.removesuffix("/")):
            return Source(scheme, rest.removesuffix("/") + "/", "")  # a whole organization
        return _parse(text)
    except ValueError as error:
        raise ValueError(f"XINGLIN_SOURCES: {text!r} is not a valid source prefix: {error}") from error


def _covers(prefix: Source, source: Source) -> bool:
    if prefix.scheme != source.scheme:
        return False
    if not prefix.place:
        return True
    if prefix.place.endswith("/"):
        return source.place.startswith(prefix.place)
    if prefix.place != source.place or prefix.revision not in (None, source.revision):
        return False
    # A prefix matches whole names: `models` covers `models/doctor`, not `models-of-others`.
    folder = prefix.path.removesuffix("/")
    return not folder or source.path == prefix.path or source.path.startswith(folder + "/")


def _parse(text: str) -> Source:
    """Parse a source. Raises ValueError, whose message does not repeat text that may be a secret."""
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"must have at most {_MAX_LENGTH} characters")
    if not text.isascii() or not text.isprintable() or text != text.strip():
        raise ValueError(
            "must be printable ASCII without surrounding spaces: percent-encode other characters"
        )
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"must begin with one of {', '.join(f'{known}://' for known in _SCHEMES)}")
    if "?" in rest or "#" in rest:
        raise ValueError(
            "must have no query or fragment: give credentials to the service as environment variables"
        )
    if "\\" in rest:
        raise ValueError("must have no backslash: separate folders by '/'")
    return _hub(rest) if scheme == "hf" else _elsewhere(scheme, rest)


def _hub(rest: str) -> Source:
    match = _HUB.fullmatch(rest.removesuffix("/"))
    if match is None:
        raise ValueError("must be hf://org/repo, hf://org/repo@revision or hf://org/repo@revision/folder")
    place, revision, path = match["place"], match["revision"], match["path"] or ""
    if not all(map(_is_hub_name, place.split("/"))):
        raise ValueError("the name of the organization or repository is not valid on the hub")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(
            "the revision is not a valid commit, branch or tag; for a name with '/' give its commit"
        )
    if "%" in path:
        raise ValueError("the folder has a '%' in its name")
    _check_path(path)
    return Source("hf", place, path, revision)


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and ".." not in name and "--" not in name


def _elsewhere(scheme: str, rest: str) -> Source:
    place, _, path = rest.partition("/")
    if "@" in place:
        raise ValueError(
            "must have no user name or password: give credentials to the service as environment variables"
        )
    if scheme in _DEFAULT_PORTS:
        place = _host(place.lower(), _DEFAULT_PORTS[scheme])
    elif not _BUCKET.fullmatch(place) or ".." in place:
        raise ValueError("the name of the bucket is not valid")
    elif "%" in path:
        raise ValueError("the key has a '%' in it: give the key without percent-encoding")
    _check_path(path)
    if scheme not in _DEFAULT_PORTS and path and not path.lower().endswith((*ARCHIVE_SUFFIXES, "/")):
        path += "/"  # a folder
    if scheme in _DEFAULT_PORTS and " " in path:
        raise ValueError("the path has a space: write %20")
    return Source(scheme, place, path)


def _host(place: str, default_port: int) -> str:
    """Return the canonical host, with its port unless that is the default."""
    host, port = place, ""
    if not place.endswith("]"):
        host, separator, port = place.rpartition(":")
        if not separator:
            host, port = place, ""
        elif not _PORT.fullmatch(port) or int(port) > 65535:
            raise ValueError("the port must be a number from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        address = ipaddress.IPv6Address(host[1:-1])
        if address.scope_id is not None:
            raise ValueError("the address must not have a zone")
        host = f"[{address.compressed}]"
    elif _LAST_LABEL_OF_AN_ADDRESS.fullmatch(host):
        host = str(ipaddress.IPv4Address(host))  # only four decimal numbers, no other notation
    elif not _HOST.fullmatch(host):
        raise ValueError("the name of the host is not valid")
    return host if not port or int(port) == default_port else f"{host}:{port}"


def _check_path(path: str) -> None:
    if not _PATH.fullmatch(path):
        raise ValueError("the path has characters that must be percent-encoded")
    plain = unquote(path, errors="surrogateescape")
    encoded_away = plain.count("/") != path.count("/") or "%" in plain or "\\" in plain
    if encoded_away or any(ord(character) < 32 or ord(character) == 127 for character in plain):
        raise ValueError("the path has an encoded '/', '\\', '%' or control character")
    parts = plain.removesuffix("/").split("/") if plain else []
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("the path has an empty, '.' or '..' part")
