"""Pydantic's errors in plain words."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, SecretStr, TypeAdapter, ValidationError, field_validator

from adapters.wording import in_words, no_such_setting


class Even(BaseModel, extra="forbid"):
    number: int

    @field_validator("number")
    @classmethod
    def _check(cls, number: int) -> int:
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (int, "many", "must be a whole number"),
        (int, 1.5, "must be a whole number"),
        (int, None, "must be a whole number"),
        (float, "x", "must be a number"),
        (Annotated[float, Field(allow_inf_nan=False)], math.nan, "must be a finite number"),
        (bool, "perhaps", "must be true or false"),
        (str, 5, "must be text"),
        (list[int], 5, "must be a list"),
        (dict[str, int], 5, "must be an object of names and values"),
        (Even, 5, "must be an object of names and values"),
        (Even, {"number": 1}, "1 is odd"),
        (Even, {}, "is missing"),
        (Even, {"number": 2, "other": 1}, "is not a known field"),
        (Path, 5, "must be a path"),
        (Literal["auto", "disabled"], "x", "must be 'auto' or 'disabled'"),
        (Annotated[int, Field(ge=1)], 0, "must be at least 1"),
        (Annotated[int, Field(gt=1)], 0, "must be more than 1"),
        (Annotated[int, Field(le=1)], 2, "must be at most 1"),
        (Annotated[float, Field(lt=1)], 2, "must be less than 1.0"),
        (Annotated[str, Field(min_length=8)], "k", "must have at least 8 characters"),
        (Annotated[SecretStr, Field(min_length=8)], "k", "must have at least 8 characters"),
        (Annotated[list[int], Field(max_length=1)], [1, 2], "must have at most 1 entry"),
        (Annotated[str, Field(pattern="^[a-z]$")], "1", "must match ^[a-z]$"),
    ],
)
def test_words_for_each_error(kind: Any, value: Any, words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(kind).validate_python(value)
    (problem,) = raised.value.errors()
    assert in_words(problem) == words


def test_the_most_similar_setting_is_suggested() -> None:
    assert no_such_setting("max_lora", ["max_loras", "port"]) == "no such setting; did you mean `max_loras`?"
    assert no_such_setting("colour", ["max_loras", "port"]) == "no such setting"
