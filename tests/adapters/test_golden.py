"""adapters/golden.py: reading and writing golden prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from adapters import GoldenPrompt, InvalidAdapter, read_golden, write_golden
from tests.adapters.folders import GOLDEN

GOOD: dict[str, Any] = GOLDEN.model_dump()


def test_golden_prompts_are_read_back(tmp_path: Path) -> None:
    other = GoldenPrompt(**{**GOOD, "messages": [{"role": "user", "content": 'line\nline\u2028"\x85 👩‍⚕️'}]})
    write_golden(tmp_path / "golden.jsonl", [GOLDEN, other])
    assert read_golden(tmp_path / "golden.jsonl") == [GOLDEN, other]


def test_separators_within_a_message_do_not_split_lines(tmp_path: Path) -> None:
    """JSON does not escape U+2028 and U+0085, and str.splitlines() splits at them."""
    path = tmp_path / "golden.jsonl"
    content = "a\u2028b\x85c\x0cd"
    text = json.dumps({**GOOD, "messages": [{"role": "user", "content": content}]}, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    assert read_golden(path)[0].messages[0]["content"] == content


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"logprobs": []}, "the same length"),
        ({"base_logprobs": [-1.0, -2.0]}, "the same length"),
        ({"logprobs": [float("nan")]}, "finite"),
        ({"base_logprobs": [float("-inf")]}, "finite"),
        ({"messages": []}, "messages"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"token_ids": [], "logprobs": [], "base_logprobs": []}, "token_ids"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"token_ids": [1 << 31]}, "token_ids"),
        ({"extra": 1}, "extra"),
    ],
)
def test_invalid_prompts_are_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError):
        GoldenPrompt(**{**GOOD, **change})
    path = tmp_path / "golden.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps({**GOOD, **change})}\n")
    with pytest.raises(InvalidAdapter, match=problem) as caught:
        read_golden(path)
    assert caught.value.problems[0].startswith("golden.jsonl line 2: ")


def test_every_bad_line_is_named_in_a_short_message(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    bad_key = json.dumps({**GOOD, "密" * 5000: 1}).encode()
    (tmp_path / "golden.jsonl").write_bytes(
        b"\n".join([good, b"{", b"", b"\xff", b"[" * 5000, bad_key, good])
    )
    with pytest.raises(InvalidAdapter) as caught:
        read_golden(tmp_path / "golden.jsonl")
    problems = caught.value.problems
    assert [problem.split(":")[0][-1] for problem in problems] == list("23456")
    assert all(problem.isascii() and len(problem) < 300 for problem in problems)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"\n" * 100_000, "at most 64"), (b" " * ((4 << 20) + 1), "larger than 4 MiB")],
    ids=["lines", "bytes"],
)
def test_too_large_files_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "golden.jsonl").write_bytes(content)
    with pytest.raises(InvalidAdapter, match=problem):
        read_golden(tmp_path / "golden.jsonl")
