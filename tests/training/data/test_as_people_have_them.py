"""Files as spreadsheets, pandas and other projects write them: read as clearly intended, or refused with one error."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.training.data.samples import ASSISTANT, CHAT, USER, said, written
from training.config import Source
from training.data import read_chats, read_feedback
from training.errors import DataError

Q, A = USER["content"], ASSISTANT["content"]
ROWS = [CHAT, {"messages": [said("user", f"{Q}!"), said("assistant", A)]}]


def chats(tmp_path: Path, name: str, content: str | bytes) -> list[dict[str, Any]]:
    return [dict(row) for row in read_chats([written(tmp_path / name, content)])]


@pytest.mark.parametrize(
    "content",
    [
        f"\ufeffQuestion,Answer\r\n{Q},{A}\r\n",
        f"QUESTION , ANSWER\n{Q},{A}\n",
        f"question,answer\r{Q},{A}\r",
        f"question;answer\n{Q};{A}\n",
        f"\ufeffquestion;answer\r\n{Q};{A}\r\n",
    ],
    ids=["Excel", "capitals and spaces", "old Macs", "semicolons", "semicolons of Excel"],
)
def test_csv_of_spreadsheets(tmp_path: Path, content: str) -> None:
    assert chats(tmp_path, "d.csv", content) == [CHAT]


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    row = {"instruction": Q, "input": math.nan, "system": math.nan, "output": A}
    assert chats(tmp_path, "d.jsonl", json.dumps(row)) == [CHAT]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    assert [dict(one) for one in read_chats([Source(path=str(tmp_path / "d.parquet"))])] == [CHAT]


@pytest.mark.parametrize("name", ["data", "train", "rows", "examples"])
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_key(tmp_path: Path, name: str, indent: int | None) -> None:
    content = json.dumps({"version": 1, name: ROWS}, indent=indent, ensure_ascii=False)
    assert chats(tmp_path, "d.json", content) == ROWS


def test_several_lists_of_rows_are_refused_with_one_error(tmp_path: Path) -> None:
    content = json.dumps({"train": ROWS, "test": ROWS}, indent=1)
    with pytest.raises(DataError, match=r"d\.json: contains several lists of rows, train and test") as caught:
        chats(tmp_path, "d.json", content)
    assert len(str(caught.value).splitlines()) == 1


def test_one_row_over_many_lines(tmp_path: Path) -> None:
    assert chats(tmp_path, "d.json", json.dumps(CHAT, indent=2)) == [CHAT]


def test_a_bad_row_under_a_key_is_reported_by_its_index(tmp_path: Path) -> None:
    content = json.dumps({"data": [CHAT, {"messages": []}]})
    with pytest.raises(DataError, match=r"d\.json:data\[2\]: there is no user message"):
        chats(tmp_path, "d.json", content)


def test_the_data_list_of_a_huatuogpt_row_is_not_a_list_of_rows(tmp_path: Path) -> None:
    assert chats(tmp_path, "d.jsonl", json.dumps({"data": [f"问：{Q}", f"答：{A}"]})) == [CHAT]


def test_concatenated_files(tmp_path: Path) -> None:
    content = "".join(f"\ufeff{json.dumps(row)}\n" for row in ROWS)
    assert chats(tmp_path, "d.jsonl", content) == ROWS


def test_line_numbers_count_empty_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:4: "):
        chats(tmp_path, "d.jsonl", f"\n\n{json.dumps(CHAT)}\n{{}}\n")


def test_content_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": Q[:2]}, {"type": "text", "text": Q[2:]}]
    row = {"messages": [{"role": "user", "content": parts}, said("assistant", A)]}
    assert chats(tmp_path, "d.jsonl", json.dumps(row)) == [CHAT]
    image = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
    row["messages"][0] = {"role": "user", "content": [*parts, image]}
    with pytest.raises(DataError, match=r"a part of type image_url; only text is supported"):
        chats(tmp_path, "d.jsonl", json.dumps(row))


def test_a_greeting_before_the_first_question_is_dropped(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": Q},
            {"from": "gpt", "value": A},
        ]
    }
    assert chats(tmp_path, "d.jsonl", json.dumps(row)) == [CHAT]


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        ({"kto_tag": True}, True),
        ({"label": "good"}, True),
        ({"label": "No"}, False),
        ({"kto_tag": "false"}, False),
    ],
)
def test_other_label_keys_and_values(tmp_path: Path, label: dict[str, Any], meant: bool) -> None:
    (row,) = read_feedback([written(tmp_path / "d.jsonl", json.dumps({**CHAT, **label}))])
    assert row["label"] is meant
