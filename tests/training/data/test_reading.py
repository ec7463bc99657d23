import logging
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.samples import CHAT, write, written
from training.config import OnError, Source
from training.data import read_chats, read_documents
from training.errors import DataError

DOCUMENTS = [{"text": str(number)} for number in range(10)]


def test_bad_rows_of_all_files_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *[{}] * 15)
    second = written(tmp_path / "b.jsonl", '{"messages": \n' + '{"instruction": 1}\n' * 14)
    with pytest.raises(DataError) as caught:
        read_chats([first, second])
    told = str(caught.value)
    assert told.startswith(
        "30 bad rows: fix them, or set `on_error: {action: skip, limit: 30}` to train without them\n"
    )
    assert "\na.jsonl:15: found nothing" in told
    assert "\nb.jsonl:1: not JSON: Expecting value" in told
    assert told.endswith("\nb.jsonl:5: instruction must be text, not int\n... and 10 more")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
        {"prompt": "Ask", "chosen": "good", "rejected": "bad"},
        {"instruction": "Ask", "output": ["good", "bad"]},
    ],
)
def test_pairs_for_a_chat_stage_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: a pair of a better and a worse answer: use it with stage rm, dpo"
    ):
        read_chats([write(tmp_path / "d.jsonl", row)])


def test_skipped_bad_rows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "d.jsonl", *[{}] * 21, CHAT)
    assert read_chats([source], OnError(action="skip", limit=21)) == [CHAT]
    assert caplog.messages[0].startswith("skipped: d.jsonl:1: found nothing")
    assert caplog.messages[20:] == ["skipped: ... and 1 more"]


def test_more_bad_rows_than_the_limit_are_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {}, CHAT, {})
    with pytest.raises(DataError, match=r"^2 bad rows, but on_error allows to skip only 1: .*limit: 2"):
        read_chats([source], OnError(action="skip", limit=1))


def test_an_unreadable_file_is_an_error_even_with_skip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        read_chats([written(tmp_path / "d.jsonl", b"\xff")], OnError(action="skip"))


@pytest.mark.parametrize("on_error", [OnError(), OnError(action="skip")])
def test_no_rows_at_all_is_an_error(tmp_path: Path, on_error: OnError) -> None:
    sources = [write(tmp_path / "a.jsonl", CHAT), write(tmp_path / "b.jsonl")]
    with pytest.raises(DataError, match=r"^no rows in b\.jsonl"):
        read_chats(sources, on_error)


def test_messages_and_logs_contain_no_row_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "张三患艾滋病"
    rows = [
        {"messages": [{"role": secret, "content": secret}]},
        {"messages": [{"role": "user", "content": secret}] * 2},
        {"prompt": secret, "completion": [secret], secret: secret},
        {secret: secret},
        {"data": [f"答：{secret}"]},
        {"question": secret, "answer": "\ufffd" + secret, "history": [secret]},
        {"text": secret},
        secret,
    ]
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError) as caught:
        read_chats([write(tmp_path / "d.jsonl", CHAT, *rows)])
    with pytest.raises(DataError) as broken:
        read_chats([written(tmp_path / "e.csv", f'question,answer\n"{secret}"{secret},b\n')])
    read_chats([write(tmp_path / "d.jsonl", CHAT, *rows)], OnError(action="skip"))
    assert f"{len(rows)} bad rows" in str(caught.value)
    assert secret not in str(caught.value) + str(broken.value) + caplog.text
    assert str(tmp_path) not in str(caught.value) + str(broken.value) + caplog.text


def test_sources_files_and_rows_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "b.jsonl", *DOCUMENTS[2:4])
    write(tmp_path / "folder" / "a.jsonl", *DOCUMENTS[4:6])
    sources = [write(tmp_path / "z.jsonl", *DOCUMENTS[:2]), Source(path=str(tmp_path / "folder"))]
    assert [row["text"] for row in read_documents(sources)] == ["0", "1", "4", "5", "2", "3"]


def weighed(folder: Path, weight: float, seed: int = 0) -> list[str]:
    write(folder / "d.jsonl", *DOCUMENTS)
    source = Source(path=str(folder / "d.jsonl"), weight=weight)
    return [row["text"] for row in read_documents([source], seed=seed)]


def test_a_source_is_repeated_by_its_weight(tmp_path: Path) -> None:
    every = [row["text"] for row in DOCUMENTS]
    assert weighed(tmp_path, 3) == every * 3
    part = weighed(tmp_path, 2.3)
    assert part[:20] == every * 2
    assert len(part) == 23


def test_a_weight_below_1_keeps_rows_selected_by_the_seed(tmp_path: Path) -> None:
    half = weighed(tmp_path, 0.5)
    assert len(set(half)) == 5
    assert half == sorted(half) == weighed(tmp_path, 0.5)
    assert len({tuple(weighed(tmp_path, 0.5, seed)) for seed in range(10)}) > 5


def test_a_tiny_weight_keeps_one_row(tmp_path: Path) -> None:
    assert len(weighed(tmp_path, 0.001)) == 1


def test_sources_are_sampled_independently(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", *DOCUMENTS) for name in "ab"]
    sources = [Source(path=source.path, weight=0.5) for source in files]
    found = [row["text"] for row in read_documents(sources, seed=1)]
    assert found[:5] != found[5:]


def test_no_sources_have_no_rows() -> None:
    assert read_chats([]) == []
