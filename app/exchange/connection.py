"""Request ids in responses, and cancellation of a request whose client disconnects."""

import asyncio
import re
import uuid
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self, cast

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_LEFT = 499
"""The status of a request whose client disconnected, as in nginx. No client sees it."""

_AN_ID = re.compile(r"[!-~]{1,128}")


def own_id(request: Request[Any]) -> str:
    """Return the service's own, unique id of a request."""
    return str(request.scope.setdefault("xinglin.request_id", uuid.uuid4().hex))


def request_id_headers(request: Request[Any]) -> dict[str, str]:
    """Return the id of a request under the headers that OpenAI's and Anthropic's clients read.

    The id is the client's own X-Request-Id if that has at most 128 printable characters, else the service's.
    """
    given = request.headers.get("x-request-id", "")
    request_id = given if _AN_ID.fullmatch(given) else own_id(request)
    return {"x-request-id": request_id, "request-id": request_id}


class RequestIds:
    """Middleware that adds the request id to every response but the 500 for a defect of ours, made outside of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def started(message: Message) -> None:
            headers = MutableHeaders(scope=message)
            for name, value in request_id_headers(Request(scope)).items():
                headers.setdefault(name, value)
            await send(message)

        def passed_on(message: Message) -> Awaitable[None]:  # runs for every event of a stream
            return started(message) if message["type"] == "http.response.start" else send(message)

        await self._app(scope, receive, passed_on)


class ClientLeft(Exception):
    """The client disconnected."""


class WhileConnected:
    """A block that is cancelled and raises ClientLeft when its client disconnects; works as asyncio.timeout."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    async def __aenter__(self) -> Self:
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self._watching.cancel()
        if self._has_left:
            self._task.uncancel()
            # vLLM turns a cancellation into an error of its own.
            if isinstance(error, asyncio.CancelledError | Exception):
                raise ClientLeft from None

    def leave(self) -> None:
        """End the block as if the client had disconnected."""
        if not self._has_left:
            self._has_left = True
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.leave()
