import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
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
    written,
)
from training.data import read_chats, read_documents, read_feedback, read_preferences
from training.errors import DataError

PAIR = {"question": "感冒怎么办？", "answer": "多休息。"}


def table(rows: list[list[str]], delimiter: str = ",", **how: Any) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, **how).writerows(rows)
    return out.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    keys = dict.fromkeys(key for row in rows for key in row)
    pyarrow.parquet.write_table(pyarrow.table({key: [row.get(key) for row in rows] for key in keys}), out)
    return out.getvalue()


TWO_LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in [CHAT, CHAT])
JSON_FORMS = {
    "lines": TWO_LINES,
    "escaped lines": "\n".join(json.dumps(row) for row in [CHAT, CHAT]) + "\n",
    "array": json.dumps([CHAT, CHAT]),
    "indented array": json.dumps([CHAT, CHAT], indent=2),
    "byte order mark": "\ufeff" + TWO_LINES + "\n",
    "array with byte order mark": "\ufeff\r\n" + json.dumps([CHAT, CHAT]),
    "windows lines": TWO_LINES.replace("\n", "\r\n") + "\r\n\r\n",
    "empty lines": "\n\n" + TWO_LINES.replace("\n", "\n  \n"),
}


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.txt", "d.csv", "d.data", "d", "d.jsonl.gz"])
@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_is_detected_by_content_not_by_name(tmp_path: Path, name: str, form: str) -> None:
    content = JSON_FORMS[form].encode()
    for zipped in (content, gzip.compress(content)):
        assert read_chats([written(tmp_path / name, zipped)]) == [CHAT, CHAT]


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.tsv", "D.CSV"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_the_first_line_of_csv_names_the_columns(
    tmp_path: Path, name: str, delimiter: str, quoting: Any
) -> None:
    content = "\ufeff" + table(
        [
            ["", "question", "answer", "system", ""],
            ["0", "感冒怎么办？", "多休息。", "", "x"],
            ["", "", " ", "", ""],
        ],
        delimiter,
        quoting=quoting,
    )
    for zipped in (content.encode(), gzip.compress(content.encode())):
        assert read_chats([written(tmp_path / name, zipped)]) == [CHAT]


def test_csv_cells_are_always_text(tmp_path: Path) -> None:
    content = 'question,answer\n1+1,2\n"a ""b""\n\nc, d",true\n'
    found = read_chats([written(tmp_path / "d.csv", content)])
    assert [[message["content"] for message in row["messages"]] for row in found] == [
        ["1+1", "2"],
        ['a "b"\n\nc, d', "true"],
    ]


def test_csv_cells_hold_lists_as_json(tmp_path: Path) -> None:
    messages, history = json.dumps(CHAT["messages"]), json.dumps([["感冒怎么办？", "多休息。"]])
    rows = [
        ["messages", "history", "question", "answer", "system"],
        [messages, "", "", "", ""],
        ["", history, USER_2["content"], ASSISTANT_2["content"], SYSTEM["content"]],
    ]
    assert read_chats([written(tmp_path / "d.csv", table(rows))]) == [CHAT, LONG_CHAT]


def test_a_csv_cell_may_be_very_long(tmp_path: Path) -> None:
    (found,) = read_chats([written(tmp_path / "d.csv", table([["问", "答"], ["a", "b" * 200_000]]))])
    assert len(found["messages"][1]["content"]) == 200_000


def test_labels_in_csv_are_words_or_numbers(tmp_path: Path) -> None:
    rows = [["prompt", "completion", "label"], ["a", "b", "TRUE"], ["a", "c", "0"]]
    found = read_feedback([written(tmp_path / "d.csv", table(rows))])
    assert [row["label"] for row in found] == [True, False]


def test_csv_rows_are_reported_by_their_first_line(tmp_path: Path) -> None:
    content = 'question,answer\r\n"a\r\nb","c\r\nd"\r\n\r\nx\r\n"e\r\nf",\r\ng,h,i\r\n'
    with pytest.raises(DataError) as caught:
        read_chats([written(tmp_path / "d.csv", content)])
    assert str(caught.value).splitlines()[1:] == [
        "d.csv:6: the row has 1 cells, but the first line names 2 columns",
        "d.csv:7: no answer to learn: the last message must be from the assistant",
        "d.csv:9: the row has 3 cells, but the first line names 2 columns",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('question,answer\na,b\n"c,d\ne,f\n', r"d\.csv:3: not CSV: unexpected end of data"),
        ('question,answer\n"发烧"怎么办,b\n', r"d\.csv:2: not CSV: .* quote cells that contain quotes"),
        ('"question', r"d\.csv:1: not CSV"),
        ("answer,answer\na,b\n", r"d\.csv:1: two columns have the same name"),
        ("我头痛三天了,多休息\na,b\n", r"d\.csv:2: found something else; expected"),
        ("question,answer\n", r"no rows in d\.csv"),
        ("", r"no rows in d\.csv"),
    ],
)
def test_invalid_csv_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_chats([written(tmp_path / "d.csv", content)])


def test_parquet(tmp_path: Path) -> None:
    # One schema for all rows: the keys of the others are null.
    chats = parquet([CHAT, {**LONG_CHAT, "id": 3}, {"instruction": "感冒怎么办？", "output": "多休息。"}])
    weighed = parquet([{"messages": [USER, {**ASSISTANT, "weight": 1, "name": "x"}]}])
    for content in (chats, gzip.compress(chats)):
        assert read_chats([written(tmp_path / "d", content)]) == [CHAT, LONG_CHAT, CHAT]
    assert read_chats([written(tmp_path / "d.parquet", weighed)]) == [CHAT]


def test_parquet_of_preferences(tmp_path: Path) -> None:
    openai = {
        "input": {"messages": [USER], "tools": None},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [WORSE],
    }
    both = parquet([PREFERENCE, LONG_PREFERENCE, openai])
    assert read_preferences([written(tmp_path / "d", both)]) == [PREFERENCE, LONG_PREFERENCE, PREFERENCE]


def test_parquet_rows_are_reported_by_number(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}] * 1500 + [{"question": "a"}]
    with pytest.raises(DataError, match=r"d\.parquet:row 1501: no answer"):
        read_chats([written(tmp_path / "d.parquet", parquet(rows))])


def test_numbers_in_parquet_are_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d:row 1: answer must be text, not int"):
        read_chats([written(tmp_path / "d", parquet([{"question": "a", "answer": 4}]))])


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    content = parquet([PAIR] * 10)
    for damaged in (content[:-9], content[:4], content[:60] + b"\xff" * 40 + content[100:]):
        with pytest.raises(DataError, match=r"d: damaged, or not a Parquet file"):
            read_chats([written(tmp_path / "d", damaged)])


def test_plain_text_has_one_document_per_line(tmp_path: Path) -> None:
    source = written(tmp_path / "d.txt", "\ufeff第一章\r\n\r\n　　传染病。\n[1] 参考文献\n{甲}\n")
    texts = [row["text"] for row in read_documents([source])]
    assert texts == ["第一章", "传染病。", "[1] 参考文献", "{甲}"]


def test_bad_plain_text_is_reported_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.txt:3: text contains a NUL character"):
        read_documents([written(tmp_path / "d.txt", "a\n\nb\0\n")])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"question": \n', "1: not JSON: Expecting value at column 13"),
        ("[" * 100_000, r"1: not JSON: nested too deeply"),
        (json.dumps(PAIR) + "\n" + '{"a":' * 100_000, "2: not JSON: nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "1: not JSON: a number has too many digits"),
        ('[\n{"a": ' + "9" * 5000 + "}]", "2: not JSON: a number has too many digits"),
        ('[\n{"text": "a"},\n{"text": \n', r"\d: not JSON"),
        ('[{"text": "a"},', "1: not JSON"),
        ("[", "1: not JSON"),
        ("[]\n[]", "1: unexpected text after the array"),
        ("[1, [2]]", "1: a row must be a JSON object"),
    ],
)
def test_broken_json_is_reported_by_line(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"d\.json:{reason}"):
        read_documents([written(tmp_path / "d.json", content)])


def test_rows_of_an_indented_array_are_reported_by_their_first_line(tmp_path: Path) -> None:
    text = json.dumps([CHAT, {"x": 1}], indent=1)
    line = text.splitlines().index(" {", 2) + 1
    with pytest.raises(DataError, match=rf"d\.json:{line}: found x"):
        read_chats([written(tmp_path / "d.json", text)])


@pytest.mark.parametrize(
    ("name", "encoding", "cure"),
    [
        ("d.jsonl", "gb18030", "byte 27 is not UTF-8; .*`iconv -f gb18030 -t utf-8`"),
        ("d.json", "utf-16", "byte 0 is not UTF-8; .*`iconv -f utf-16 -t utf-8`"),
        ("d.txt", "gb18030", "byte 27 is not UTF-8"),
    ],
)
def test_other_encodings_are_refused_with_a_fix(tmp_path: Path, name: str, encoding: str, cure: str) -> None:
    content = '{"text": "a"}\n{"text": "b感冒"}'.encode(encoding)
    if encoding == "gb18030":
        content = content.replace(b'"b', b'"bcd')
    with pytest.raises(DataError, match=cure):
        read_documents([written(tmp_path / name, content)])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"README\.md: not a data file: .* such as `data/\*\.jsonl`"):
        read_documents([written(tmp_path / "README.md", "# Data")])


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(b'{"text": "a"}\n' * 100_000)
    for damaged in (content[:-20], content[:3], content[:200] + b"\0" * 100 + content[300:]):
        with pytest.raises(DataError, match=r"d\.gz: cannot be read: the file is damaged"):
            read_documents([written(tmp_path / "d.gz", damaged)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    source = written(tmp_path / "d.jsonl", "{}")
    (tmp_path / "d.jsonl").unlink()
    with pytest.raises(DataError, match=r"^d\.jsonl: cannot be read: No such file or directory"):
        read_documents([source])
