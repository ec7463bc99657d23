"""POST /v1/chat/completions: access and admission, lease, engine, stream.

Every request ends in exactly one of: a whole reply, a finish chunk and [DONE], an error body or event, or
an abort in the engine because the client left.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.access import chat as may_chat
from app.errors import ApiError, BadRequest, row

router = APIRouter()

MAX_BODY_BYTES = 4 << 20  # parsing blocks everybody; the longest contexts are below this
BODY_SECONDS = 60


@router.post("/v1/chat/completions", dependencies=[Depends(may_chat)])
async def create_chat_completion(request: Request) -> Response:
    """Answer one chat completion request, as OpenAI's API does."""
    state = request.state
    started = time.perf_counter()
    served_as = "unknown"  # a label is never what a client made up
    status = 499  # the client left
    try:
        with ExitStack() as held:
            held.enter_context(state.admission.place())
            body = await _body(request)
            engine = state.supervisor.engine
            lease = held.enter_context(state.served_models.lease(body["model"]))
            served_as = body["model"]
            request_id = uuid.uuid4().hex
            headers = {"x-request-id": request_id}
            if lease.resident:
                headers["x-adapter-revision"] = lease.resident.manifest.revision
            answer = await _unless_client_leaves(
                request,
                engine.chat(
                    body, request_id=request_id, adapter=lease.adapter, fingerprint=lease.fingerprint
                ),
            )
            status = 200
            if isinstance(answer, dict):
                return JSONResponse(answer, headers=headers)
            state.metrics.time_to_first_event.observe(time.perf_counter() - started)
            return _EventStream(answer, held.pop_all(), headers)
    except (_ClientLeft, ClientDisconnect):
        return Response(status_code=499)
    except Exception as error:
        status = row(error).status if isinstance(error, ApiError) else 500
        raise
    finally:
        state.metrics.requests.labels(served_as, status).inc()


async def _body(request: Request) -> dict[str, Any]:
    """The JSON body, as far as this service must know it; the engine checks the rest."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise BadRequest(
                f"the request is larger than {MAX_BODY_BYTES >> 20} MiB", code="request_too_large"
            )
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request body is not JSON", code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_json")
    for key in ("model", "messages"):
        if key not in body:
            raise BadRequest(
                f"{key}: this parameter is required", code="missing_required_parameter", param=key
            )
    if not isinstance(body["model"], str):
        raise BadRequest("model: must be a string", code="invalid_value", param="model")
    return body


class _ClientLeft(Exception):
    """Nobody is there to answer any more."""


async def _unless_client_leaves(
    request: Request, answer: Coroutine[Any, Any, dict[str, Any] | AsyncGenerator[str]]
) -> dict[str, Any] | AsyncGenerator[str]:
    """Await `answer`; when the client disconnects first, abort it in the engine and raise _ClientLeft."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.create_task(answer), asyncio.create_task(leaving()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise _ClientLeft
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events that hold a lease and a place until the last one is sent, or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], held: ExitStack, headers: dict[str, str]) -> None:
        super().__init__(events, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with self._held:
                await self._events.aclose()
