"""Reading any file gives rows or raises DataError."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.samples import CHAT, LONG_CHAT, LONG_PREFERENCE, PREFERENCE, written
from tests.training.data.test_files import parquet
from training.config import OnError
from training.data import read_chats, read_documents, read_feedback, read_preferences, read_prompts, report
from training.errors import DataError

READERS = [read_chats, read_documents, read_preferences, read_feedback, read_prompts]
WORDS = """messages conversations items data instruction input output history system system_prompt prompt
    completion question answer query response 问 答 text chosen rejected response_chosen response_rejected
    preferred_output non_preferred_output label tools role content from value weight"""
KEYS = WORDS.split()
SEEDS = [
    json.dumps(CHAT).encode(),
    json.dumps([LONG_CHAT, PREFERENCE], indent=1).encode(),
    json.dumps(LONG_PREFERENCE, ensure_ascii=False).encode(),
    'question,answer\n"a\nb",c\n'.encode("utf-8-sig"),
    parquet([CHAT, PREFERENCE]),
    gzip.compress(json.dumps(CHAT).encode()),
    "第一章\n传染病".encode(),
]


def some_value(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(10 if depth < 4 else 6)
    if kind < 3:
        return chance.choice(
            ["", " ", "a", "问：a", "<user>: a", "\ud800", "\0", "[", '["a"]', "user", "gpt"]
        )
    if kind < 6:
        return chance.choice([None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf")])
    if kind < 8:
        return [some_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(KEYS): some_value(chance, depth + 1) for _ in range(chance.randrange(5))}


def some_row(chance: random.Random) -> Any:
    row = json.loads(json.dumps(chance.choice([CHAT, LONG_CHAT, PREFERENCE, LONG_PREFERENCE])))
    for _ in range(chance.randrange(4)):
        row[chance.choice(KEYS)] = some_value(chance)
    return chance.choice([row, row, some_value(chance)])


def some_file(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        rows = [some_row(chance) for _ in range(5)]
        return (
            json.dumps(rows).encode() if chance.random() < 0.3 else "\n".join(map(json.dumps, rows)).encode()
        )
    content = bytearray(chance.choice([chance.randbytes(60), *SEEDS]))
    for _ in range(chance.randrange(6)):
        at = chance.randrange(len(content))
        content[at : at + chance.randrange(3)] = chance.choice([chance.randbytes(2), b'"', b"[", b"\n", b""])
    return bytes(content)


@pytest.mark.parametrize("seed", range(4))
def test_reading_gives_rows_or_data_error(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(150):
        name = chance.choice(["d.json", "d.csv", "d.tsv", "d.txt", "d.parquet", "d.jsonl.gz"])
        source = written(tmp_path / name, some_file(chance), weight=chance.choice([0.5, 1, 2]))
        for read in READERS:
            for on_error in (OnError(), OnError(action="skip", limit=1000)):
                try:
                    rows = read([source], on_error)
                except DataError as error:
                    str(error).encode()  # can be printed
                else:
                    json.dumps(rows, ensure_ascii=False).encode()  # can be tokenized
                    report(rows, rows)
