"""Golden prompts: answers of the adapter with the trainer's scores, against which an engine is proved."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.errors import InvalidAdapter, shown
from adapters.manifest import TokenId
from adapters.wording import in_words

GOLDEN_FILE = "golden.jsonl"
MAX_GOLDEN_PROMPTS = 64
_MAX_BYTES = 4 << 20


class GoldenPrompt(BaseModel):
    """One prompt with the adapter's greedy answer, scored by the trainer with and without the adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: list[dict[str, str]] = Field(min_length=1)
    prompt_token_ids: list[TokenId] = Field(
        min_length=1, description="Token ids of `messages`, rendered for generation"
    )
    token_ids: list[TokenId] = Field(min_length=1, description="Greedy answer of the adapter")
    logprobs: list[float] = Field(description="Natural log-probability of each token with the adapter")
    base_logprobs: list[float] = Field(
        description="Natural log-probability of each token without the adapter"
    )

    @model_validator(mode="after")
    def _one_score_a_token(self) -> Self:
        if not len(self.token_ids) == len(self.logprobs) == len(self.base_logprobs):
            raise ValueError("token_ids, logprobs and base_logprobs must have the same length")
        if not all(math.isfinite(score) for score in (*self.logprobs, *self.base_logprobs)):
            raise ValueError("logprobs must be finite")
        return self


def write_golden(path: Path, prompts: Iterable[GoldenPrompt]) -> None:
    """Write golden prompts, one JSON object per line."""
    path.write_text("".join(prompt.model_dump_json() + "\n" for prompt in prompts), encoding="utf-8")


def read_golden(path: Path) -> list[GoldenPrompt]:
    """Read golden prompts. Raises InvalidAdapter naming every bad line, OSError."""
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidAdapter([f"{GOLDEN_FILE} is larger than {_MAX_BYTES >> 20} MiB: keep 8 to 20 prompts"])
    lines = path.read_bytes().splitlines()  # bytes, since U+2028 and others also end a line of text
    if len(lines) > MAX_GOLDEN_PROMPTS:
        raise InvalidAdapter(
            [f"{GOLDEN_FILE} has {len(lines)} prompts: at most {MAX_GOLDEN_PROMPTS} are allowed"]
        )
    prompts, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(GoldenPrompt.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = f"{shown('.'.join(map(str, first['loc'])))}: " if first["loc"] else ""
            problems.append(f"{GOLDEN_FILE} line {number}: {where}{in_words(first)}")
    if problems:
        raise InvalidAdapter(problems)
    return prompts
