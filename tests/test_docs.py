"""What the documents say is so: settings, endpoints, targets, version."""

import re
import tomllib
from pathlib import Path

import pytest

from app.engine.base import Endpoint
from app.errors import Code
from app.main import create_app
from app.settings import Settings

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh.md"]


def _shown(default: object) -> str:
    if default in (None, (), ""):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


@pytest.mark.parametrize("readme", READMES)
def test_every_setting_is_in_the_table_with_its_default(readme: str) -> None:
    rows = re.findall(r"^\| `(XINGLIN_\w+)` \| (.*?) \| (.+?) \|$", (ROOT / readme).read_text(), re.M)
    documented = {name: default.strip() for name, default, _ in rows}
    assert documented == {
        f"XINGLIN_{name.upper()}": _shown(field.default) for name, field in Settings.model_fields.items()
    }


def test_the_table_says_what_help_says() -> None:
    text = (ROOT / "README.md").read_text()
    assert not [f.description for f in Settings.model_fields.values() if f"| {f.description} |" not in text]


@pytest.mark.parametrize("readme", READMES)
def test_every_endpoint_is_documented(readme: str) -> None:
    text = (ROOT / readme).read_text().replace("{model}", "{model:path}")
    routes = {
        f"{method} {route.path}".replace("{name:path}", "{name}")
        for route in create_app(Settings()).routes
        for method in getattr(route, "methods", None) or ()
        if getattr(route, "include_in_schema", False)
    }
    assert len(routes) >= 11
    assert not [route for route in routes if f"`{route}`" not in text]


def test_every_error_code_is_in_its_table() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| (no|yes, after (\d+) s) \| (.*) \|$",
        (ROOT / "docs/errors.md").read_text(),
        re.M,
    )
    documented = [(code, int(status), retry and int(retry), text) for code, status, _, retry, text in rows]
    assert documented == [
        (code.value, code.answer.status, code.answer.retry_after or "", code.answer.meaning) for code in Code
    ]


def test_the_openapi_page_has_a_body_to_try_for_each_endpoint_of_an_engine() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    for endpoint in Endpoint:
        content = paths[endpoint]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        assert all("model" in example["value"] for example in content["examples"].values())


@pytest.mark.parametrize("readme", READMES)
def test_commands_named_exist(readme: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / readme).read_text()))
    assert {"demo", "test", "clean"} <= targets
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)]


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert create_app(Settings()).version == version


def test_ci_runs_the_readmes_test_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"
