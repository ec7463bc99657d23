"""Data files of any accepted format in, canonical rows out; every bad row is named by file, line and reason.

Files are JSON Lines, or one JSON array, whatever their ending says. Formats are recognised row by row:

    OpenAI    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    Alpaca    {"instruction": "…", "input": "…", "output": "…"}, and perhaps "history": [["…", "…"]]
    ShareGPT  {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    text      {"text": "…"}; only for pre-training
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""`{"messages": [...]}`: perhaps a system message, then user and assistant in turns, ending with the
assistant; or `{"text": "…"}` where a stage takes text."""

_SHOWN = 20
_SHAREGPT_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "system": "system",
}  # fmt: skip


class DataError(Exception):
    """Data files that cannot be trained on. The message names each bad row, one a line."""


class _BadRow(Exception):
    """Why one row cannot be used."""


def read_chats(paths: Iterable[Path], bad_rows: Literal["stop", "skip"] = "stop") -> list[Row]:
    """Rows of conversations, as `messages`. Raises DataError naming every bad row, unless told to skip them."""
    return _read(paths, bad_rows, _to_chat)


def read_documents(paths: Iterable[Path], bad_rows: Literal["stop", "skip"] = "stop") -> list[Row]:
    """Rows of `text` or `messages`, for pre-training. Raises DataError as `read_chats` does."""
    return _read(paths, bad_rows, _to_document)


def _read(
    paths: Iterable[Path], bad_rows: Literal["stop", "skip"], canonical: Callable[[Any], Row]
) -> list[Row]:
    rows, problems = [], []
    for path in paths:
        for line, found in _parse(path):
            try:
                rows.append(canonical(found))
            except _BadRow as reason:
                problems.append(f"{path}:{line}: {reason}")
    if problems and bad_rows == "stop":
        more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{len(problems)} bad rows: correct them, or set `bad_rows: skip` to train without them\n"
            + "\n".join(problems[:_SHOWN])
            + more
        )
    for problem in problems:
        log.warning("left out: %s", problem)
    if not rows:
        raise DataError(f"no rows in {', '.join(map(str, paths))}")
    return rows


def _parse(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of every row; a row that is no JSON is passed on as a _BadRow."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8; convert the file first, for example "
            f"`iconv -f gb18030 -t utf-8 {path.name}`"
        ) from error
    if text.lstrip().startswith("["):
        yield from _parse_array(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, _BadRow(f"not JSON: {error.msg} at column {error.colno}")


def _parse_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON array, each with the line it begins on."""
    decoder = json.JSONDecoder()
    at, line, seen = text.index("[") + 1, 1, 0
    while True:
        while text[at : at + 1] in {" ", "\n", "\r", "\t", ","} and at < len(text):
            at += 1
        if text[at : at + 1] == "]":
            return
        line += text.count("\n", seen, at)
        seen = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
            ) from error
        yield line, value


def _to_document(found: Any) -> Row:
    if isinstance(found, dict) and "text" in found:
        return {"text": _text(found["text"], "text")}
    return _to_chat(found)


def _to_chat(found: Any) -> Row:
    if isinstance(found, _BadRow):
        raise found
    if not isinstance(found, dict):
        raise _BadRow("a row must be a JSON object")
    if "messages" in found:
        messages = [_message(item, "role", "content", {}) for item in _list(found["messages"], "messages")]
    elif "conversations" in found:
        turns = _list(found["conversations"], "conversations")
        messages = [_message(item, "from", "value", _SHAREGPT_ROLES) for item in turns]
    elif "instruction" in found:
        messages = _from_alpaca(found)
    else:
        keys = ", ".join(map(str, found)) or "nothing"
        raise _BadRow(f"found {keys}; expected messages, conversations, or instruction and output")
    _check_turns([message["role"] for message in messages])
    return {"messages": messages}


def _from_alpaca(found: Row) -> list[dict[str, str]]:
    messages = []
    for number, pair in enumerate(_list(found.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _BadRow(f"history[{number}] must be a pair of question and answer")
        messages += [{"role": "user", "content": _text(pair[0], f"history[{number}][0]")}]
        messages += [{"role": "assistant", "content": _text(pair[1], f"history[{number}][1]")}]
    question = _text(found["instruction"], "instruction")
    if found.get("input"):
        question += "\n" + _text(found["input"], "input")
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(found.get("output"), "output")},
    ]


def _message(item: Any, role: str, content: str, roles: dict[str, str]) -> dict[str, str]:
    if not isinstance(item, dict) or role not in item or content not in item:
        raise _BadRow(f"every message needs {role!r} and {content!r}")
    by = _text(item[role], role)
    return {"role": roles.get(by, by), "content": _text(item[content], content)}


def _check_turns(roles: list[str]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for number, role in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            raise _BadRow(f"turn {number + 1} is by {role!r}; user and assistant must alternate, user first")
    if not turns or len(turns) % 2:
        raise _BadRow("the last message must be the assistant's: there is no answer to learn")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _BadRow(f"{name} must be a list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{name} must be text, not {type(value).__name__}")
    if not value.strip():
        raise _BadRow(f"{name} is empty")
    return value
