"""The admin key: required to change adapters, and for chat beyond loopback."""

import hmac
import os
import secrets
from pathlib import Path
from typing import Any

from fastapi import Request

from app.errors import Unauthorized

KEY_FILE = "admin.key"


class Access:
    """Checks `Authorization: Bearer KEY`, or `x-api-key: KEY`."""

    def __init__(self, admin_key: str, *, is_chat_open: bool) -> None:
        if not admin_key:
            raise ValueError("the admin key is empty: set XINGLIN_ADMIN_KEY, or remove the key file")
        self._admin_key = admin_key.encode()
        self._is_chat_open = is_chat_open

    def require_admin(self, request: Request[Any]) -> None:
        """Check for the admin key. Raises Unauthorized."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not scheme:  # Anthropic's clients send x-api-key instead
            scheme, key = "bearer", request.headers.get("x-api-key", "")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self._admin_key):
            raise Unauthorized("the admin key is required: send Authorization: Bearer XINGLIN_ADMIN_KEY")

    def require_chat(self, request: Request[Any]) -> None:
        """Check for the admin key unless chat is open. Raises Unauthorized."""
        if not self._is_chat_open:
            self.require_admin(request)


def stored_admin_key(data_dir: Path) -> str:
    """Return the key kept in the data directory. Generates it on first use, readable only by its owner."""
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / KEY_FILE
    if not path.exists():
        temporary = data_dir / f".{KEY_FILE}.{os.getpid()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"xl-{secrets.token_urlsafe(24)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # fails if another process was first
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return path.read_text().strip()
