from pathlib import Path
from typing import Any

import pytest

from tests.training.data.samples import ASSISTANT, ASSISTANT_2, CHAT, LONG_CHAT, SYSTEM, USER, USER_2, write
from training.data import read_chats, read_documents
from training.errors import DataError

Q, A, Q2, A2 = (message["content"] for message in (USER, ASSISTANT, USER_2, ASSISTANT_2))
S = SYSTEM["content"]
TOOL_CALL = {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"messages": [{"role": "User", "content": Q, "name": "li"}, {**ASSISTANT, "weight": 1}]},
        {"messages": [USER, {**ASSISTANT, "weight": None, "tool_calls": None}], "tools": []},
        {"instruction": Q, "input": "", "output": A},
        {"instruction": Q, "output": A, "history": []},
        {"instruction": Q, "input": None, "output": A, "history": None, "id": 3},
        {"instruction": f" <user>: {Q}", "input": "", "output": A},
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "tools": "[]"},
        {"id": 7, "conversations": [{"from": "user", "value": Q}, {"from": "bot", "value": A}]},
        {"items": [{"from": "human", "value": Q}, {"from": "chatgpt", "value": A}]},
        {"conversations": [USER, ASSISTANT], "system": ""},
        {"data": [f"问：{Q}", f"答：{A}"]},
        {"data": [f"问:{Q}", f" 答: {A}", f"问：{Q2}"]},
        {"data": [Q, A]},
        {"prompt": Q, "completion": A},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"question": Q, "answer": A},
        {"query": Q, "response": A},
        {"问": Q, "答": A},
    ],
)
def test_every_format_converts_to_messages(tmp_path: Path, row: object) -> None:
    assert read_chats([write(tmp_path / "d.jsonl", row)]) == [CHAT]


@pytest.mark.parametrize(
    "row",
    [
        LONG_CHAT,
        {"messages": [{"role": "developer", "content": S}, *LONG_CHAT["messages"][1:]]},
        {"messages": LONG_CHAT["messages"], "system": S},
        {"system": S, "history": [[Q, A]], "instruction": Q2, "output": A2},
        {"system": S, "instruction": f" <user>: {Q} <bot>: {A} <user>: {Q2}", "input": "", "output": A2},
        {
            "system_prompt": S,
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "gpt", "value": A},
                {"from": "human", "value": Q2},
                {"from": "gpt", "value": A2},
            ],
        },
        {"system": S, "data": [f"问：{Q}", f"答：{A}", f"问：{Q2}", f"答：{A2}"]},
        {"system": S, "history": [[Q, A]], "question": Q2, "answer": A2},
        {"system": S, "history": [[Q, A]], "prompt": Q2, "completion": A2},
    ],
)
def test_every_format_supports_many_turns_and_a_system_message(tmp_path: Path, row: object) -> None:
    assert read_chats([write(tmp_path / "d.jsonl", row)]) == [LONG_CHAT]


def test_alpacas_input_follows_its_instruction_on_a_new_line(tmp_path: Path) -> None:
    (found,) = read_chats([write(tmp_path / "d.json", {"instruction": "a", "input": "b", "output": "c"})])
    assert found["messages"][0]["content"] == "a\nb"


def test_an_answer_with_weight_0_is_kept(tmp_path: Path) -> None:
    row = {"messages": [USER, {**ASSISTANT, "weight": 0}, USER_2, {**ASSISTANT_2, "weight": 1}]}
    (found,) = read_chats([write(tmp_path / "d.jsonl", row)])
    assert found == {"messages": [USER, {**ASSISTANT, "weight": 0}, USER_2, ASSISTANT_2]}


def test_answers_in_a_prompt_have_no_loss(tmp_path: Path) -> None:
    row = {"prompt": [USER, ASSISTANT, USER_2], "completion": [ASSISTANT_2]}
    (found,) = read_chats([write(tmp_path / "d.jsonl", row)])
    assert found == {"messages": [USER, {**ASSISTANT, "weight": 0}, USER_2, ASSISTANT_2]}


def test_documents_may_be_text_or_chats(tmp_path: Path) -> None:
    rows = [{"text": "感冒是常见病。"}, CHAT]
    assert read_documents([write(tmp_path / "d.jsonl", *rows, {"问": Q, "答": A})]) == [*rows, CHAT]


BAD: list[tuple[Any, str]] = [
    ({"messages": [USER]}, "no answer to learn: the last message must be from the assistant"),
    ({"messages": []}, "there is no user message"),
    ({"messages": [SYSTEM]}, "there is no user message"),
    (
        {"messages": [ASSISTANT, USER]},
        "no answer to learn: the last message must be from the assistant",
    ),
    ({"messages": [ASSISTANT, ASSISTANT]}, "turn 1 is from 'assistant'"),
    ({"messages": [USER, USER, ASSISTANT]}, "turn 2 is from 'user'"),
    ({"messages": [USER, SYSTEM, ASSISTANT]}, "turn 2 is from 'system'"),
    ({"messages": [SYSTEM, USER, ASSISTANT], "system": "another"}, "there are two different system messages"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1]: content is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1]: content is missing"),
    ({"messages": [USER, {"role": "assistant", "content": 4}]}, "messages[1]: content must be text, not int"),
    ({"messages": [USER, {"role": ["x"], "content": "a"}]}, "messages[1]: role must be text, not list"),
    ({"messages": [USER, {"content": "a"}]}, "messages[1]: role is missing"),
    ({"messages": [USER, "a"]}, "messages[1] must be an object with role and content"),
    ({"messages": "hello"}, "messages must be a list"),
    ({"messages": "[{"}, "messages must be a list, but is not valid JSON"),
    ({"messages": [USER, TOOL_CALL]}, "tool calls are not supported"),
    ({"messages": [USER, {"role": "tool", "content": "a"}]}, "tool calls are not supported"),
    ({"conversations": [{"from": "observation", "value": "a"}]}, "tool calls are not supported"),
    ({**CHAT, "tools": '[{"name": "search"}]'}, "tool calls are not supported"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "no answer to learn: all answers have weight 0"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "messages[1]: weight must be 0 or 1"),
    ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, "messages[0]: weight must be 0 or 1"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0] is from alien; expected system"),
    (
        {"conversations": [{"from": "张三", "value": "x"}]},
        "conversations[0] is from something else; expected",
    ),
    ({"data": ["答：x", "问：y"]}, "data[0] must be from the user, but starts with 答"),
    ({"data": ["问：x", "问：y"]}, "data[1] must be from the assistant, but starts with 问"),
    ({"data": ["问：x", "答："]}, "data[1] is empty"),
    ({"data": ["问：x"]}, "no answer to learn"),
    ({"data": "x"}, "data must be a list"),
    ({"instruction": "<user>: x <bot>: y", "output": "z"}, "turn 3 is from 'assistant'"),
    ({"instruction": "<user>: x <bot>:  <user>: y", "output": "z"}, "instruction is empty"),
    ({"instruction": "a", "output": ""}, "no answer to learn"),
    ({"instruction": "a", "output": "  "}, "output is empty"),
    ({"instruction": "a"}, "no answer to learn"),
    ({"instruction": "", "output": "a"}, "instruction is empty"),
    ({"instruction": "a", "output": 4.5}, "output must be text, not float"),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0] must be a pair"),
    ({"instruction": "a", "output": "b", "history": [["q", ""]]}, "history[0] is empty"),
    ({"question": "a\0", "answer": "b"}, "question contains a NUL character"),
    ({"question": "a", "answer": "肝\ufffd炎"}, "answer contains U+FFFD"),
    ({"text": "a"}, "found text; expected messages, conversations"),
    ({}, "found nothing; expected messages"),
    ({"张三，男，45岁": "x"}, "found something else; expected"),
    (["a"], "a row must be a JSON object"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_reported_by_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    source = write(tmp_path / "d.jsonl", CHAT, row)
    with pytest.raises(DataError) as caught:
        read_chats([source])
    assert f"\nd.jsonl:2: {reason}" in str(caught.value)


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "a", "answer": "\\ud83d"}')
    with pytest.raises(DataError, match=r"d\.jsonl:1: answer contains half of a surrogate pair"):
        read_chats([write(tmp_path / "e.jsonl", CHAT).model_copy(update={"files": (tmp_path / "d.jsonl",)})])


@pytest.mark.parametrize(("row", "reason"), [({"text": " "}, "text is empty"), ({"text": 1}, "must be text")])
def test_a_bad_document_is_reported(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_documents([write(tmp_path / "d.jsonl", row)])
