"""Every error has a code, every code a response, and OpenAI's clients understand each body."""

import re
from pathlib import Path

import pytest

import app
from adapters import AdapterError, InvalidAdapter
from app import errors
from app.errors import Code


def _tree(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


@pytest.mark.parametrize("kind", [*_tree(errors.ApiError)[1:], *_tree(AdapterError)])
def test_every_error_has_a_code_of_its_own(kind: type[Exception]) -> None:
    assert kind in errors.TABLE


def test_every_code_is_used() -> None:
    sources = [path for path in Path(app.__file__).parent.rglob("*.py") if path.name != "errors.py"]
    named = {name for path in sources for name in re.findall(r"\bCode\.([A-Z_]+)", path.read_text())}
    assert {Code[name] for name in named} | {*errors.TABLE.values()} == {*Code}


def test_no_code_is_a_string_literal() -> None:
    written = re.compile(r"""code=["']""")
    assert not [
        str(path) for path in Path(app.__file__).parent.rglob("*.py") if written.search(path.read_text())
    ]


@pytest.mark.parametrize("kind", errors.TABLE)
def test_bodies_have_string_codes(kind: type[Exception]) -> None:
    error = InvalidAdapter(["one", "two"]) if kind is InvalidAdapter else kind("what is wrong")
    detail = errors.body(error)["error"]
    assert {"message", "type", "param", "code"} <= detail.keys()
    assert isinstance(detail["code"], str)
    assert str(error) == detail["message"]


def test_all_problems_of_an_adapter_reach_the_client() -> None:
    assert errors.body(InvalidAdapter(["one", "two"]))["error"]["problems"] == ["one", "two"]


@pytest.mark.parametrize("code", Code)
def test_clients_retry_only_if_a_retry_can_help(code: Code) -> None:
    headers = errors.headers(errors.ApiError("", code=code))
    assert ("retry-after" in headers) == (code.answer.status in (409, 429, 503))
    assert ("retry-after" in headers) != (headers.get("x-should-retry") == "false")


def test_an_errors_own_code_decides_its_status() -> None:
    assert errors.status_of(errors.BadRequest("")) == 400
    assert errors.status_of(errors.ResponseNotFound("", code=Code.PREVIOUS_RESPONSE_NOT_FOUND)) == 404
    assert (errors.status_of(ValueError()), errors.status_of(KeyboardInterrupt())) == (500, 499)
