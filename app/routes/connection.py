"""What happens when a client leaves while its request is being answered."""

import asyncio
from types import TracebackType
from typing import Any, Self, cast

from starlette.types import Receive


class ClientLeft(Exception):
    """Nobody is there to answer any more."""


class WhileConnected:
    """A block that is cancelled when its client leaves, and then raises ClientLeft; made as asyncio.timeout is."""

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
            if isinstance(error, asyncio.CancelledError):
                raise ClientLeft from None

    def leave(self) -> None:
        """End the block as if the client had left."""
        if not self._has_left:
            self._has_left = True
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.leave()
