"""Finds words that the rules for plain English in CONTRIBUTING.md rule out: `python docs/prose.py`, exit code 1 if any.

It reads the pages and the texts that programs show: settings, `--help` (docs/en/commands.md), error codes, and the
OpenAPI page. Each word comes with the one to use instead.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.errors import Code
from app.main import create_app
from app.settings import Settings
from training.config import STAGES

ROOT = Path(__file__).parent.parent
ENGLISH = [
    ROOT / "README.md",
    ROOT / "adapters/README.md",
    *ROOT.glob("docs/en/*.md"),
]
CHINESE = [ROOT / "README.zh.md", *ROOT.glob("docs/zh/*.md")]

WORDS = {
    r"\bgo(es)? on with\b": "continue from, keep",
    r"\b(is|are|was|were|be|being) told\b": "shown, logged, reported",
    r"\btold (beside|by|what|to stop)\b": "shown, asked",
    r"\bway back\b|\b(one|revision|alias) before it\b|\brevision before\b": "previous revision",
    r"\bstray(s|ing|ed)?\b": "KL, differ",
    r"\bof one mind\b": "agree",
    r"\bnobody (was|is) hurt\b|\bHURT\b": "PASS, FAIL",
    r"\bdrawn by chance\b": "random",
    r"\bis well again\b": "is available again",
    r"\bbrings? (none|no)\b": "has no",
    r"\bso as to\b": "to",
    r"\ball the same\b": "(leave it out)",
    r"\blie(s)? about\b": "is left",
    r"\bwhosoever\b|\bwhoever\b": "the user, the client",
    r"\bin its turn\b": "(leave it out)",
    r"\bso many (days|seconds|steps|rows|times)\b": "a number",
    r"\bwhat is (waited|asked) for\b": "the reason, the request",
    r"\bby itself\b(?! in an)": "automatically, alone",
    r"(^|[.:;] )(Of|Who|Whoever) [a-z]": "start with the subject",
    r"\bwould else\b|\belse it would\b": "otherwise",
    r"\bnot any more\b": "no longer",
}
COINAGES = {"证明": "验证", "黄金提示": "基准提示", "量具": "测试工具", "调和": "协调"}


def texts() -> Iterator[tuple[str, str]]:
    """Every English text, with where it stands."""
    for path in ENGLISH:
        for number, line in enumerate(_prose(path), start=1):
            yield f"{path.relative_to(ROOT)}:{number}", line
    for name, field in Settings.model_fields.items():
        yield f"setting {name}", field.description or ""
    for stage, config in STAGES.items():
        for name, field in config.model_fields.items():
            yield f"stage {stage}, {name}", field.description or ""
    for code in Code:
        yield f"error code {code}", code.answer.meaning
    yield from _described("openapi", create_app(Settings()).openapi())


def _prose(path: Path) -> list[str]:
    """The lines of a page; those of examples empty, but not of what --help says."""
    text = path.read_text(encoding="utf-8")
    if path.name != "commands.md":
        text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.S)
    return text.splitlines()


def _described(place: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("summary", "description") and isinstance(inner, str):
                yield f"{place} {key}", inner
            else:
                yield from _described(f"{place}/{key}", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _described(place, inner)


def main() -> int:
    """Print what there is to change; returns the exit code."""
    found = [
        f"{place}: {match[0].strip()!r}: {advice}"
        for place, text in texts()
        for pattern, advice in WORDS.items()
        for match in [re.search(pattern, text)]
        if match
    ]
    for path in CHINESE:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {word}: {better}"
                for word, better in COINAGES.items()
                if word in line
            ]
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
