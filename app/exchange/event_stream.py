"""Sends server-sent events as they arrive: the part of a response that runs for every token."""

import asyncio
import logging
from collections.abc import Callable

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from app.engine.base import DONE, Events
from app.errors import ApiError, status_of
from app.exchange.connection import CLIENT_LEFT, ClientLeft, WhileConnected

logger = logging.getLogger(__name__)

SEND_SECONDS = 60  # a client that does not read holds an engine slot


class EventStream(Response):
    """Sends events until the last one, or until the client disconnects or stops reading."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, headers: dict[str, str], *, on_end: Callable[[int], None]) -> None:
        """Calls `on_end(status)` once, when the engine has stopped writing."""
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]  # not known yet
        self._events = events
        self._on_end = on_end
        self._sent = 0
        self._is_sending = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events. If the events end in an error, the last one reports it."""
        outcome = CLIENT_LEFT
        looks: list[asyncio.TimerHandle] = []
        try:
            async with WhileConnected(receive) as connection:
                self._look_later(connection, looks)
                outcome = await self._send(send)
        except ClientLeft:
            pass
        finally:
            looks.pop().cancel()
            try:
                await self._events.aclose()
            finally:
                self._on_end(outcome)

    async def _send(self, send: Send) -> int:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        outcome = 200
        try:
            self._is_sending = False
            async for event in self._events:
                self._is_sending = True
                is_last = event.endswith(DONE)
                await send({"type": "http.response.body", "body": event, "more_body": not is_last})
                if is_last:
                    return outcome
                self._is_sending = False
                self._sent += 1
        except ApiError as error:
            outcome = status_of(error)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome

    def _look_later(
        self, connection: WhileConnected, looks: list[asyncio.TimerHandle], stood_at: int = -1
    ) -> None:
        """Check every SEND_SECONDS for an event still being sent. One timer costs less than one for each event."""

        def look() -> None:
            if self._is_sending and self._sent == stood_at:
                logger.info("a client stopped reading its response: aborting its request")
                connection.leave()
            self._look_later(connection, looks, self._sent if self._is_sending else -1)

        looks[:] = [asyncio.get_running_loop().call_later(SEND_SECONDS, look)]
