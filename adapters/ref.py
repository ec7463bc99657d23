"""Refs: how one adapter is named. `doctor`, `doctor@canary` (alias) or `doctor@3f2a9c1b77de` (revision)."""

import re
from dataclasses import dataclass
from typing import Self

from adapters.errors import InvalidRef, shown

DEFAULT_ALIAS = "default"

# Lower case only: names are folders, and some file systems fold case.
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_REVISION = re.compile(r"[0-9a-f]{12}")


def check_name(name: str) -> str:
    """`name` itself, if it can name an adapter; raises InvalidRef if it cannot."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRef(
            f"{shown(name)} cannot name an adapter: use 1 to 64 lower-case letters, digits, '-', '_' or "
            "single '.', beginning and ending with a letter or digit"
        )
    return name


def check_alias(alias: str) -> str:
    """`alias` itself, if it can name an alias; raises InvalidRef if it cannot."""
    if not _NAME.fullmatch(alias) or ".." in alias or _REVISION.fullmatch(alias):
        raise InvalidRef(
            f"{shown(alias)} cannot name an alias: use the letters of an adapter name, and not 12 "
            "hexadecimal digits, which name a revision"
        )
    return alias


def check_revision(revision: str) -> str:
    """`revision` itself, if it has the form of one; raises InvalidRef if it has not."""
    if not _REVISION.fullmatch(revision):
        raise InvalidRef(f"{shown(revision)} is not a revision: a revision is 12 hexadecimal digits")
    return revision


@dataclass(frozen=True)
class AdapterRef:
    """One adapter: `alias` or `revision` is set, never both."""

    name: str
    alias: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name`, `name@alias` or `name@revision`; a bare name means the alias `default`.

        Raises InvalidRef.
        """
        name, at, pointer = text.partition("@")
        check_name(name)
        if not at:
            return cls(name, alias=DEFAULT_ALIAS)
        if _REVISION.fullmatch(pointer):
            return cls(name, revision=pointer)
        return cls(name, alias=check_alias(pointer))

    def __str__(self) -> str:
        return f"{self.name}@{self.revision or self.alias}"
