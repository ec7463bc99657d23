"""The import rules of pyproject.toml hold, and the sizes that keep files readable."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_import_contracts_are_kept() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-logo"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout


def test_no_module_outgrows_one_sitting() -> None:
    modules = [path for room in ("adapters", "app", "training") for path in (ROOT / room).rglob("*.py")]
    assert len(modules) > 30
    assert not [str(path) for path in modules if len(path.read_text().splitlines()) > 400]


def test_light_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, app.settings, adapters, adapters.__main__;"
        "import training.config, training.runs.events, training.__main__;"
        "print([m for m in ('torch', 'transformers', 'peft', 'trl', 'vllm', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
