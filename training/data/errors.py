"""What can be wrong with data. No message holds anything that a row says: rows may speak of patients."""

import re

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,23}")


class BadRow(Exception):
    """Why one row cannot be used."""


def shown(name: str) -> str:
    """A key or role as a message may tell it: what is not plainly a name may be a patient's words."""
    return name if _NAME.fullmatch(name) else "something else"
