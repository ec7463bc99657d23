"""Writes the reference pages that follow from the code: settings, commands, error codes.

python docs/reference.py            # write them
python docs/reference.py --check    # exit with 1 if one is not as it would be written
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from app.errors import Code
from app.settings import Settings

_PIPE = "\\|"  # within a table

HERE = Path(__file__).parent
COMMANDS = {
    "app": ("serve", "swap-storm"),
    "training": (
        "run", "resume", "demo", "list", "show", "preview", "estimate", "convert-adapter", "merge", "export",
    ),
    "adapters": (
        "validate", "publish", "list", "show", "diff", "prune", "alias", "unalias", "rollback", "canary",
        "shadow", "promote", "abort",
    ),
}  # fmt: skip


def settings() -> str:
    """The table of settings."""
    rows = [
        f"| `XINGLIN_{name.upper()}` | {_default(field.default)} | {str(field.description).replace('|', _PIPE)} |"
        for name, field in Settings.model_fields.items()
    ]
    return f"""# Settings

Each setting is an environment variable, and an option of `python -m app serve` (`XINGLIN_MAX_LORAS` is
`--max-loras`). `XINGLIN_ADMIN_KEY`, `XINGLIN_PUBLISH_ROOTS`, `XINGLIN_SOURCES` and `XINGLIN_PRIVATE_NETWORKS` are
environment variables only. `python -m training` and `python -m adapters` read `XINGLIN_DATA_DIR` too. Training reads
two keys: `XINGLIN_ADMIN_KEY` of a rollout service, and `XINGLIN_JUDGE_KEY` of a judge.

| Variable | Default | Meaning |
| --- | --- | --- |
{_lines(rows)}
"""


def _default(default: object) -> str:
    if default in (None, (), ""):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def errors() -> str:
    """The table of error codes."""
    rows = [
        f"| `{code}` | {code.answer.status} | {_retry(code.answer.retry_after)} | {code.answer.meaning} |"
        for code in Code
    ]
    return f"""# Error codes

Every error has OpenAI's shape: `{{"error": {{"message", "type", "param", "code"}}}}`. Errors of `/v1/messages` have
Anthropic's shape, with the code in `error.details.error_code`. Programs should read `code`: `message` is for people
and may change. If a retry can help, the response has `retry-after`; otherwise it has `x-should-retry: false`.

| Code | Status | Retry | Meaning |
| --- | --- | --- | --- |
{_lines(rows)}
"""


def _retry(seconds: int | None) -> str:
    return f"yes, after {seconds} s" if seconds else "no"


@functools.cache
def help_of_all() -> str:
    """The help of every command."""
    blocks = [
        f"## python -m {package}\n\n```text\n{_help(package)}\n```\n\n"
        + "\n".join(
            f"### {package} {command}\n\n```text\n{_help(package, command)}\n```\n" for command in names
        )
        for package, names in COMMANDS.items()
    ]
    return "\n".join(blocks)


def commands() -> str:
    """The page of commands."""
    return f"# Commands\n\nThe output of `--help` of every command.\n\n{help_of_all()}"


def commands_in_chinese() -> str:
    """The same page, with a heading in Chinese: programs speak English."""
    return f"# 命令\n\n每个命令的 `--help` 输出（程序的输出为英文）。\n\n{help_of_all()}"


def _help(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XINGLIN_")} | {
        "COLUMNS": "100"
    }
    result = subprocess.run(
        [sys.executable, "-m", *command, "--help"], capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


def _lines(rows: list[str]) -> str:
    return "\n".join(rows)


PAGES: dict[str, Callable[[], str]] = {
    "en/settings.md": settings,
    "en/errors.md": errors,
    "en/commands.md": commands,
    "zh/commands.md": commands_in_chinese,
}


def main() -> int:
    """Write or check all pages; returns the exit code."""
    stale = []
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"docs/{name}")
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"not as the code says: {', '.join(stale)}: run `make docs-reference`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
