"""The admin key: where it comes from, and what it guards."""

import stat
from pathlib import Path

import pytest
from starlette.requests import Request

from app.access import KEY_FILE, Access, stored_admin_key
from app.errors import Unauthorized


def _request(authorization: str | None) -> Request:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize(
    "given", [None, "", "secret", "Basic secret", "Bearer", "Bearer ", "Bearer wrong", "Bearer secret2"]
)
def test_without_the_key_nothing_changes(given: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        Access("secret", is_chat_open=True).require_admin(_request(given))
    assert "secret2" not in str(caught.value)


def test_the_key_opens_everything() -> None:
    access = Access("secret", is_chat_open=False)
    access.require_admin(_request("Bearer secret"))
    access.require_chat(_request("bearer secret"))


def test_chat_needs_a_key_only_where_others_can_reach_it() -> None:
    Access("secret", is_chat_open=True).require_chat(_request(None))
    with pytest.raises(Unauthorized):
        Access("secret", is_chat_open=False).require_chat(_request("Bearer unused"))


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    key = stored_admin_key(tmp_path / "data")
    assert len(key) > 30
    assert stored_admin_key(tmp_path / "data") == key
    path = tmp_path / "data" / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == [KEY_FILE]


@pytest.mark.parametrize(("headers", "is_let_in"), [
    ([(b"x-api-key", b"secret")], True),
    ([(b"x-api-key", b"wrong")], False),
    ([(b"authorization", b"Bearer wrong"), (b"x-api-key", b"secret")], False),
])  # fmt: skip
def test_anthropics_clients_send_it_in_a_header_of_their_own(
    headers: list[tuple[bytes, bytes]], is_let_in: bool
) -> None:
    request = Request({"type": "http", "headers": headers})
    if is_let_in:
        Access("secret", is_chat_open=False).require_chat(request)
        return
    with pytest.raises(Unauthorized):
        Access("secret", is_chat_open=False).require_chat(request)
