"""Refs, which name one adapter: `doctor`, `doctor@canary` (alias) or `doctor@3f2a9c1b77de` (revision).

Names are like those on model hubs: `SQL_LoRA` or `org/My_Adapter.v1`. Each has a folder of its own, also on
case-insensitive file systems: a capital becomes `+` and the lower-case letter, and the slash becomes `+.`.
"""

import re
from dataclasses import dataclass
from typing import Self

from adapters.errors import InvalidRef, shown

DEFAULT_ALIAS = "default"

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_MAX_NAME = 96  # as on the Hugging Face hub
_ALIAS = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_REVISION = re.compile(r"[0-9a-f]{12}")


def check_name(name: str) -> str:
    """Return `name` if it is a valid adapter name. Raises InvalidRef."""
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRef(
            f"{shown(name)} cannot name an adapter: use 1 to {_MAX_NAME} letters (a-z, A-Z), digits, '-', '_' or "
            "single '.', starting and ending with a letter or digit; one '/' may join two such names"
        )
    return name


def check_alias(alias: str) -> str:
    """Return `alias` if it is a valid alias. Raises InvalidRef."""
    if not _ALIAS.fullmatch(alias) or ".." in alias or _REVISION.fullmatch(alias):
        raise InvalidRef(
            f"{shown(alias)} cannot name an alias: use 1 to 64 lower-case letters, digits, '-', '_' or single "
            "'.', starting and ending with a letter or digit; 12 hexadecimal digits are reserved for revisions"
        )
    return alias


def folder_name(name: str) -> str:
    """Return the folder name for `name`; `name` itself if it has neither capital nor slash. Raises InvalidRef."""
    return re.sub(r"[A-Z]", lambda capital: f"+{capital[0].lower()}", check_name(name)).replace("/", "+.")


def name_of(folder: str) -> str:
    """Undo `folder_name`. Raises InvalidRef if `folder` is not one of its results."""
    name = re.sub(r"\+([a-z])", lambda capital: capital[1].upper(), folder.replace("+.", "/"))
    if folder_name(name) != folder:
        raise InvalidRef(f"{shown(folder)} is not the folder of an adapter")
    return name


def check_revision(revision: str) -> str:
    """Return `revision` if it has the form of a revision. Raises InvalidRef."""
    if not _REVISION.fullmatch(revision):
        raise InvalidRef(f"{shown(revision)} is not a revision: a revision is 12 hexadecimal digits")
    return revision


@dataclass(frozen=True)
class AdapterRef:
    """A reference to one adapter: `alias` or `revision` is set, never both."""

    name: str
    alias: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `name`, `name@alias` or `name@revision`; a bare name means the alias `default`.

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
