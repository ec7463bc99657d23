"""Errors in data. Messages never contain the content of rows, which may be about patients."""

import re

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,23}")


class BadRow(Exception):
    """The reason why a row cannot be used."""


def shown(name: str) -> str:
    """Return a key or role for a message; anything that is not plainly a name could be patient data."""
    return name if _NAME.fullmatch(name) else "something else"
