"""POST /v1/responses: vLLM's serving class, with a bounded store and reported failures."""

import asyncio
import copy
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from app import errors
from app.engine.base import Events
from app.engine.vllm_serving import Ours

logger = logging.getLogger(__name__)

V = TypeVar("V")

_UNDER_WAY = ("queued", "in_progress")


class _Latest(OrderedDict[str, V]):
    """A dict that keeps the last `limit` entries."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: str, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > self._limit:
            self.popitem(last=False)


class Responses(Ours, OpenAIServingResponses):
    """Serves responses. Keeps the latest responses with `store` in memory."""

    def keep(self, limit: int) -> None:
        """Keep at most `limit` stored responses; with 0 `store` has no effect, as in vLLM."""
        self.enable_store = limit > 0
        self.response_store: dict[str, Any] = _Latest(limit)
        self.msg_store: dict[str, Any] = _Latest(limit)
        self.event_store: dict[str, Any] = _Latest(limit)

    async def retrieve(
        self, response_id: str, *, stream: bool, starting_after: int | None
    ) -> dict[str, Any] | Events:
        """Return a stored response, or with `stream` the events of a background response."""
        response = self._stored(response_id)
        if not stream:
            return self.dumped(response)
        if response_id not in self.event_store:
            raise errors.BadRequest(
                "stream: this response was not created with `background` and `stream`",
                code=errors.Code.INVALID_VALUE,
                param="stream",
            )
        one = copy.copy(self)  # `failure` is per stream
        return one.events(one.responses_background_stream_generator(response_id, starting_after))

    async def cancel(self, response_id: str) -> dict[str, Any]:
        """See Engine.cancel."""
        response = self._stored(response_id)
        if response.status not in _UNDER_WAY:
            raise errors.BadRequest(
                f"this response is {response.status}: only a queued or running background response can be cancelled",
                code=errors.Code.INVALID_VALUE,
                param="response_id",
            )
        response.status = "cancelled"
        await self._end(response_id)
        return self.dumped(response)

    async def delete(self, response_id: str) -> None:
        """See Engine.delete."""
        self._stored(response_id)
        await self._end(response_id)
        for store in (self.response_store, self.msg_store, self.event_store):
            store.pop(response_id, None)

    async def _end(self, response_id: str) -> None:
        if task := self.background_tasks.get(response_id):
            task.cancel()
            await asyncio.wait({task})

    def _stored(self, response_id: str) -> Any:
        response = self.response_store.get(response_id)
        if response is None:
            raise errors.ResponseNotFound(
                f"there is no response {response_id[:80]!r}: it was not stored, was deleted, or was evicted by later "
                "ones",
                param="response_id",
            )
        return response

    async def _run_background_request(self, request: Any, *arguments: Any, **options: Any) -> None:
        await self._told(request, super()._run_background_request(request, *arguments, **options))

    async def _run_background_request_stream(self, request: Any, *arguments: Any, **options: Any) -> None:
        await self._told(request, super()._run_background_request_stream(request, *arguments, **options))

    async def _told(self, request: Any, run: Any) -> None:
        """Await background generation; store its error in the response for later requests."""
        response = self.response_store.get(request.request_id)
        if response is not None:
            response.status = "in_progress"
        try:
            await run
        except Exception as error:
            failure = self.failure or self.translated(error)
            logger.warning("a response in the background failed: %s", failure)
            if response is not None:
                response.status = "failed"
                response.error = errors.body(failure)["error"]

    async def responses_background_stream_generator(
        self, response_id: str, starting_after: int | None = None
    ) -> AsyncGenerator[Any]:
        """Yield past events, then new ones until generation ends. Raises EngineFailed if it failed."""
        if response_id not in self.event_store:
            await asyncio.sleep(0)  # let the background task start
        events, has_more = self.event_store[response_id]
        index = 0 if starting_after is None else starting_after + 1
        while True:
            has_more.clear()
            while index < len(events):
                yield events[index]
                index += 1
            task = self.background_tasks.get(response_id)
            if task is None or task.done():
                break
            await has_more.wait()
        response = self.response_store.get(response_id)
        if response is not None and response.status == "failed":
            raise errors.EngineFailed(response.error["message"])

    async def events(self, stream: AsyncGenerator[Any]) -> AsyncGenerator[bytes]:
        """See Ours; here vLLM's generator raises its errors."""
        number = 0
        try:
            async for event in stream:
                number += 1
                yield f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n".encode()
        except Exception as error:
            self.failure = self.failure or self.translated(error)
            body = errors.body(self.failure)
            # OpenAI's event has the error's fields at the top; its clients raise if there is an error object.
            data = {**body["error"], **body, "type": "error", "sequence_number": number}
            yield f"event: error\ndata: {json.dumps(data)}\n\n".encode()
            raise self.failure from error
        finally:
            await stream.aclose()

    def dumped(self, reply: Any) -> dict[str, Any]:
        """See Ours."""
        return dict(reply.model_dump(mode="json", by_alias=True))
