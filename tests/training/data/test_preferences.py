from pathlib import Path
from typing import Any

import pytest

from tests.training.data.samples import (
    ASSISTANT,
    ASSISTANT_2,
    CHAT,
    LONG_CHAT,
    LONG_PREFERENCE,
    PREFERENCE,
    SYSTEM,
    USER,
    USER_2,
    WORSE,
    write,
)
from training.data import read_feedback, read_preferences, read_prompts
from training.errors import DataError

Q, A, Q2, A2 = (message["content"] for message in (USER, ASSISTANT, USER_2, ASSISTANT_2))
S, W = SYSTEM["content"], WORSE["content"]


def sharegpt(by: str, value: str) -> dict[str, str]:
    return {"from": by, "value": value}


PAIRS: list[Any] = [
    PREFERENCE,
    {"question": Q, "response_chosen": A, "response_rejected": W},
    {"question": Q, "response_chosen": A, "response_rejected": W, "system": "", "history": []},
    {"prompt": Q, "chosen": A, "rejected": W},
    {"prompt": [USER], "chosen": ASSISTANT, "rejected": W},
    {"prompt": Q, "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE], "messages": [USER, ASSISTANT]},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE], "score_chosen": 8.0},
    {"instruction": Q, "input": "", "chosen": A, "rejected": W},
    {"instruction": Q, "input": "", "output": [A, W]},
    {"conversations": [sharegpt("human", Q)], "chosen": sharegpt("gpt", A), "rejected": sharegpt("gpt", W)},
    {"conversations": [sharegpt("human", Q)], "chosen": A, "rejected": W},
    {
        "input": {"messages": [USER], "tools": None, "parallel_tool_calls": True},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [WORSE],
    },
]
LONG_PAIRS: list[Any] = [
    LONG_PREFERENCE,
    {"system": S, "history": [[Q, A]], "question": Q2, "response_chosen": A2, "response_rejected": W},
    {"system": S, "history": [[Q, A]], "instruction": Q2, "output": [A2, W]},
    {
        "chosen": [SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2],
        "rejected": [SYSTEM, USER, ASSISTANT, USER_2, WORSE],
    },
    {"system": S, "chosen": LONG_CHAT["messages"][1:], "rejected": [USER, ASSISTANT, USER_2, WORSE]},
    {
        "conversations": [
            sharegpt("system", S),
            sharegpt("human", Q),
            sharegpt("gpt", A),
            sharegpt("human", Q2),
        ],
        "chosen": A2,
        "rejected": W,
    },
    {
        "input": {"messages": LONG_PREFERENCE["prompt"]},
        "preferred_output": [ASSISTANT_2],
        "non_preferred_output": [WORSE],
    },
]


@pytest.mark.parametrize("row", PAIRS)
def test_every_format_converts_to_a_preference(tmp_path: Path, row: object) -> None:
    assert read_preferences([write(tmp_path / "d.jsonl", row)]) == [PREFERENCE]


@pytest.mark.parametrize("row", LONG_PAIRS)
def test_every_format_supports_many_turns_and_a_system_message(tmp_path: Path, row: object) -> None:
    assert read_preferences([write(tmp_path / "d.jsonl", row)]) == [LONG_PREFERENCE]


@pytest.mark.parametrize("row", PAIRS)
def test_a_preference_becomes_two_rows_of_feedback(tmp_path: Path, row: object) -> None:
    assert read_feedback([write(tmp_path / "d.jsonl", row)]) == [
        {"prompt": [USER], "completion": [ASSISTANT], "label": True},
        {"prompt": [USER], "completion": [WORSE], "label": False},
    ]


@pytest.mark.parametrize("label", [True, 1, "true", "True", "1"])
@pytest.mark.parametrize("row", [CHAT, {"prompt": [USER], "completion": [ASSISTANT]}, {"问": Q, "答": A}])
def test_a_chat_with_a_label_is_feedback(tmp_path: Path, row: dict[str, Any], label: object) -> None:
    good = {"prompt": [USER], "completion": [ASSISTANT], "label": True}
    source = write(tmp_path / "d.jsonl", {**row, "label": label}, {**row, "label": 0})
    assert read_feedback([source]) == [good, {**good, "label": False}]


@pytest.mark.parametrize(
    "row",
    [
        *PAIRS,
        CHAT,
        {"prompt": [USER], "reference": "kept by nobody", "completion": A, "label": True},
        {"question": Q, "answer": A, "label": "internal medicine"},
        {"data": [f"问：{Q}", f"答：{A}"]},
    ],
)
def test_the_reference_of_a_prompt_is_the_answer_in_the_data(tmp_path: Path, row: object) -> None:
    assert read_prompts([write(tmp_path / "d.jsonl", row)]) == [{"prompt": [USER], "reference": A}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"conversations": [sharegpt("human", Q)]},
        {"instruction": Q, "input": "", "output": ""},
        {"question": Q},
        {"prompt": Q, "completion": W, "label": False},
    ],
)
def test_a_prompt_without_a_good_answer_has_no_reference(tmp_path: Path, row: object) -> None:
    assert read_prompts([write(tmp_path / "d.jsonl", row)]) == [{"prompt": [USER]}]


def test_a_prompt_keeps_earlier_turns(tmp_path: Path) -> None:
    (found,) = read_prompts([write(tmp_path / "d.jsonl", LONG_CHAT)])
    assert found == {"prompt": LONG_PREFERENCE["prompt"], "reference": A2}


def test_weights_are_dropped_from_pairs(tmp_path: Path) -> None:
    first = {**ASSISTANT, "weight": 0}
    row = {"prompt": [SYSTEM, USER, first, USER_2], "chosen": {**ASSISTANT_2, "weight": 1}, "rejected": W}
    assert read_preferences([write(tmp_path / "d.jsonl", row)]) == [LONG_PREFERENCE]


BAD: list[tuple[Any, str]] = [
    (CHAT, "no pair of answers; expected chosen and rejected"),
    ({"prompt": Q, "chosen": A, "rejected": A}, "chosen and rejected are identical"),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "chosen and rejected are identical"),
    ({"instruction": Q, "output": [A, A]}, "output[0] and output[1] are identical"),
    (
        {"instruction": Q, "output": [A, W, "c"]},
        "output must be one answer, or a list of a better and a worse one",
    ),
    ({"prompt": Q, "chosen": A, "rejected": ""}, "rejected is empty"),
    ({"prompt": Q, "chosen": A}, "rejected is missing"),
    ({"question": Q, "response_rejected": W}, "response_chosen is missing"),
    ({"prompt": "", "chosen": A, "rejected": W}, "prompt is empty"),
    ({"prompt": Q, "chosen": A, "rejected": 4}, "rejected must be text, not int"),
    ({"chosen": A, "rejected": W}, "there is no prompt"),
    (
        {"chosen": [USER, ASSISTANT], "rejected": [USER_2, WORSE]},
        "there is no prompt: chosen and rejected have",
    ),
    ({"prompt": Q, "chosen": [USER], "rejected": [WORSE]}, "chosen must be one assistant message"),
    (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER_2, WORSE]},
        "the prompt must end with a user message",
    ),
    (
        {"chosen": [USER, ASSISTANT, USER_2, ASSISTANT_2], "rejected": [USER, WORSE, USER_2, ASSISTANT_2]},
        "chosen must be one assistant message",
    ),
    ({**CHAT, "chosen": A, "rejected": W}, "the prompt must end with a user message"),
    ({"input": {"messages": [USER], "tools": [{}]}, "chosen": A, "rejected": W}, "tool calls are not"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_pair_is_reported_by_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        read_preferences([write(tmp_path / "d.jsonl", PREFERENCE, row)])
    assert f"\nd.jsonl:2: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (CHAT, "label must be true or false"),
        ({**CHAT, "label": "perhaps"}, "label must be true or false"),
        ({**CHAT, "label": [True]}, "label must be true or false"),
        ({"prompt": Q, "label": True}, "there is no answer for the label"),
        ({"prompt": Q, "chosen": A, "rejected": A}, "chosen and rejected are identical"),
    ],
)
def test_bad_feedback_is_reported(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl:1: {reason}"):
        read_feedback([write(tmp_path / "d.jsonl", row)])
