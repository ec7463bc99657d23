"""Sample conversations and pairs, and functions that write rows to files."""

import json
from pathlib import Path
from typing import Any

from training.config import Source


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


SYSTEM = said("system", "你是一名医生。")
USER, ASSISTANT = said("user", "感冒怎么办？"), said("assistant", "多休息。")
USER_2, ASSISTANT_2 = said("user", "要吃药吗？"), said("assistant", "发热时可以。")
WORSE = said("assistant", "不知道。")

CHAT = {"messages": [USER, ASSISTANT]}
LONG_CHAT = {"messages": [SYSTEM, USER, ASSISTANT, USER_2, ASSISTANT_2]}
PREFERENCE = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]}
LONG_PREFERENCE = {
    "prompt": [SYSTEM, USER, ASSISTANT, USER_2],
    "chosen": [ASSISTANT_2],
    "rejected": [WORSE],
}


def write(path: Path, *rows: object) -> Source:
    """The rows as JSON Lines in a file, and the file as a source."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(path))


def written(path: Path, content: bytes | str, weight: float = 1) -> Source:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Source(path=str(path), weight=weight)
