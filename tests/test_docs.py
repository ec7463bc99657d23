"""What the documents say is so: settings, commands, error codes, endpoints, targets, links, version."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app.engine.base import Endpoint
from app.errors import Code
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh.md"]
LANGUAGES = ["en", "zh"]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*/*.md"), ROOT / "adapters/README.md"))


def test_generated_pages_are_what_the_code_says() -> None:
    command = [sys.executable, "docs/reference.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def _shown(default: object) -> str:
    if default in (None, (), ""):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_setting_is_in_the_table_with_its_default(language: str) -> None:
    page = (ROOT / "docs" / language / "settings.md").read_text()
    rows = re.findall(r"^\| `(XINGLIN_\w+)` \| (.*?) \| (.+?) \|$", page, re.M)
    documented = {name: default.strip() for name, default, _ in rows}
    assert documented == {
        f"XINGLIN_{name.upper()}": _shown(field.default) for name, field in Settings.model_fields.items()
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_error_code_is_in_the_table_with_its_status(language: str) -> None:
    page = (ROOT / "docs" / language / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([^|]+) \| (.+) \|$", page, re.M)
    assert {(code, int(status)) for code, status, *_ in rows} == {
        (code.value, code.answer.status) for code in Code
    }
    seconds = {code: re.findall(r"\d+", retry) for code, _, retry, _ in rows}
    assert seconds == {
        code.value: [str(code.answer.retry_after)] if code.answer.retry_after else [] for code in Code
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_endpoint_is_documented(language: str) -> None:
    text = (ROOT / "docs" / language / "api.md").read_text().replace("{model}", "{model:path}")
    routes = {
        f"{method} {route.path}".replace("{name:path}", "{name}")
        for route in create_app(Settings()).routes
        for method in getattr(route, "methods", None) or ()
        if getattr(route, "include_in_schema", False)
    }
    assert len(routes) >= 11
    assert not [route for route in routes if f"`{route}`" not in text]


def test_the_openapi_page_has_a_body_to_try_for_each_endpoint_of_an_engine() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    for endpoint in Endpoint:
        content = paths[endpoint]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        assert all("model" in example["value"] for example in content["examples"].values())


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_is_a_front_page(readme: str) -> None:
    text = (ROOT / readme).read_text()
    assert len(text.splitlines()) <= 150
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert {"demo", "test", "clean"} <= targets
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)]


def test_both_languages_have_the_same_pages() -> None:
    english, chinese = ({path.name for path in ROOT.glob(f"docs/{language}/*.md")} for language in LANGUAGES)
    assert english == chinese


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not (page.parent / link).exists()]


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert create_app(Settings()).version == version


def test_ci_runs_the_readmes_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"
