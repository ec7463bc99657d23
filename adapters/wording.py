"""Pydantic's validation errors in plain words, without the names of Python types."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

_NAMES = {
    "string": "text",
    "bytes": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "iterable": "a list",
    "dict": "an object of names and values",
    "mapping": "an object of names and values",
    "model": "an object of names and values",
    "model_attributes": "an object of names and values",
    "path": "a path",
}
"""Type names by prefix of pydantic's error types: `int` has int_type, int_parsing and int_from_float."""

_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a known field",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_pattern_mismatch": "must match {pattern}",
    "finite_number": "must be a finite number",
    "none_required": "must be left out",
} | {
    f"{kind}_{end}": f"must be {name}"
    for kind, name in _NAMES.items()
    for end in ("type", "parsing", "parsing_size", "from_float", "unicode")
}


def in_words(problem: Mapping[str, Any]) -> str:
    """Return one of `ValidationError.errors()` as text to put after the field's name: `must be a whole number`."""
    kind, facts = str(problem["type"]), problem.get("ctx", {})
    if kind.startswith("too_") and isinstance(problem.get("input"), str):  # a secret
        kind = f"string_{kind}"
    if words := _WORDS.get(kind):
        return (
            words.format(**facts).replace(" 1 characters", " 1 character").replace(" 1 entries", " 1 entry")
        )
    return str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")


def no_such_setting(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown setting, with the most similar `known` one."""
    near = get_close_matches(name, list(known), n=1)
    return "no such setting" + (f"; did you mean `{near[0]}`?" if near else "")
