import json
from pathlib import Path
from typing import Any

import pytest

from training.data import DataError, read_chats, read_documents

USER, ASSISTANT = {"role": "user", "content": "感冒怎么办？"}, {"role": "assistant", "content": "多休息。"}
CANONICAL = {"messages": [USER, ASSISTANT]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        CANONICAL,
        {"instruction": "感冒怎么办？", "input": "", "output": "多休息。"},
        {"instruction": "感冒怎么办？", "output": "多休息。"},
        {"conversations": [{"from": "human", "value": "感冒怎么办？"}, {"from": "gpt", "value": "多休息。"}]},
        {
            "id": 7,
            "conversations": [
                {"from": "user", "value": "感冒怎么办？"},
                {"from": "bot", "value": "多休息。"},
            ],
        },
    ],
)
def test_every_format_becomes_messages(tmp_path: Path, row: object) -> None:
    assert read_chats([write(tmp_path / "d.jsonl", row)]) == [CANONICAL]


def test_alpaca_with_input_and_history(tmp_path: Path) -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]]}
    (found,) = read_chats([write(tmp_path / "d.json", row)])
    assert [m["content"] for m in found["messages"]] == ["q", "r", "a\nb", "c"]


def test_system_messages_and_many_turns_are_kept(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT]}
    assert read_chats([write(tmp_path / "d.jsonl", row)]) == [row]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("form", ["lines", "array", "indented array", "byte order mark", "windows lines"])
def test_the_content_tells_the_container_and_not_the_ending(tmp_path: Path, name: str, form: str) -> None:
    rows = [CANONICAL, CANONICAL]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {
        "lines": "\n".join(lines),
        "array": json.dumps(rows),
        "indented array": json.dumps(rows, indent=2),
        "byte order mark": "\ufeff" + "\n".join(lines) + "\n",
        "windows lines": "\r\n".join(lines) + "\r\n\r\n",
    }[form]
    (tmp_path / name).write_bytes(text.encode())
    assert read_chats([tmp_path / name]) == rows


BAD: list[tuple[Any, str]] = [
    ({"messages": [USER]}, "the last message must be the assistant's"),
    ({"messages": []}, "the last message must be the assistant's"),
    ({"messages": [ASSISTANT, USER]}, "turn 1 is by 'assistant'"),
    ({"messages": [USER, USER, ASSISTANT]}, "turn 2 is by 'user'"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "content is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "content must be text, not NoneType"),
    ({"messages": [USER, {"role": ["x"], "content": "a"}]}, "role must be text, not list"),
    ({"messages": [USER, {"content": "a"}]}, "every message needs 'role' and 'content'"),
    ({"messages": "hello"}, "messages must be a list"),
    (
        {"conversations": [{"from": "alien", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "turn 1 is by 'alien'",
    ),
    ({"instruction": "a", "output": ""}, "output is empty"),
    ({"instruction": "a"}, "output must be text, not NoneType"),
    ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0] must be a pair"),
    (
        {"question": "a", "answer": "b"},
        "found question, answer; expected messages, conversations, or instruction",
    ),
    ({"text": "a"}, "found text; expected messages"),
    (["a"], "a row must be a JSON object"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    path = write(tmp_path / "d.jsonl", CANONICAL, row)
    with pytest.raises(DataError) as caught:
        read_chats([path])
    assert f"{path}:2: {reason}" in str(caught.value)


def test_all_bad_rows_of_all_files_are_named_and_then_counted(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *[{}] * 15)
    second = tmp_path / "b.jsonl"
    second.write_text('{"messages": \n' + '{"instruction": 1}\n' * 14)
    with pytest.raises(DataError) as caught:
        read_chats([first, second])
    told = str(caught.value)
    assert told.startswith("30 bad rows: correct them, or set `bad_rows: skip`")
    assert f"{first}:15: found nothing" in told
    assert f"{second}:1: not JSON: Expecting value" in told
    assert told.endswith("... and 10 more")


def test_rows_of_an_indented_array_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([CANONICAL, {"x": 1}], indent=1))
    line = path.read_text().splitlines().index(" {", 2) + 1
    with pytest.raises(DataError, match=rf"d\.json:{line}: found x"):
        read_chats([path])


def test_a_broken_array_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[\n{"text": "a"},\n{"text": \n')
    with pytest.raises(DataError, match=r"d\.json:\d: not JSON"):
        read_documents([path])


def test_an_array_without_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('[{"text": "a"},')
    with pytest.raises(DataError, match="not JSON"):
        read_documents([tmp_path / "d.json"])


def test_bad_rows_are_left_out_when_asked_and_still_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "d.jsonl", {}, CANONICAL)
    assert read_chats([path], "skip") == [CANONICAL]
    assert f"left out: {path}:1: found nothing" in caplog.text


def test_other_encodings_are_refused_with_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "gb.jsonl"
    path.write_bytes('{"text": "感冒"}'.encode("gb18030"))
    with pytest.raises(DataError, match=r"byte 10 is not UTF-8; .*iconv -f gb18030 -t utf-8 gb\.jsonl"):
        read_documents([path])


def test_no_rows_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows in"):
        read_chats([write(tmp_path / "d.jsonl")])


def test_documents_may_be_text_or_chats(tmp_path: Path) -> None:
    rows = [{"text": "感冒是常见病。"}, CANONICAL]
    assert read_documents([write(tmp_path / "d.jsonl", *rows)]) == rows
