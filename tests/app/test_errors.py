"""Every error has a row, and every row makes a body that OpenAI's clients understand."""

import pytest

from adapters import AdapterError, InvalidAdapter
from app import errors


def _tree(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


@pytest.mark.parametrize("kind", [*_tree(errors.ApiError)[1:], *_tree(AdapterError)])
def test_every_error_has_a_row_of_its_own(kind: type[Exception]) -> None:
    assert kind in errors.TABLE


@pytest.mark.parametrize("kind", errors.TABLE)
def test_bodies_have_string_codes(kind: type[Exception]) -> None:
    error = InvalidAdapter(["one", "two"]) if kind is InvalidAdapter else kind("what is wrong")
    detail = errors.body(error)["error"]
    assert {"message", "type", "param", "code"} <= detail.keys()
    assert isinstance(detail["code"], str)
    assert str(error) == detail["message"]


def test_all_problems_of_an_adapter_reach_the_client() -> None:
    assert errors.body(InvalidAdapter(["one", "two"]))["error"]["problems"] == ["one", "two"]


@pytest.mark.parametrize(("kind", "row"), errors.TABLE.items())
def test_clients_retry_only_what_can_help(kind: type[Exception], row: errors.Row) -> None:
    headers = errors.headers(InvalidAdapter([]) if kind is InvalidAdapter else kind(""))
    assert ("retry-after" in headers) == (row.status in (409, 429, 503))
    assert ("retry-after" in headers) != (headers.get("x-should-retry") == "false")
