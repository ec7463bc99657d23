"""Stored responses of POST /v1/responses: retrieve, cancel, delete."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response

from app.engine.base import Engine
from app.errors import EngineUnavailable, ResponseNotFound
from app.exchange.event_stream import EventStream
from app.exchange.state import AppRequest
from app.routes.access import chat as may_chat
from app.routes.openapi import failures

T = TypeVar("T")

router = APIRouter(
    prefix="/v1/responses", dependencies=[Depends(may_chat)], responses=failures(400, 401, 404, 503)
)


@router.get("/{response_id}")
async def retrieve_response(
    request: AppRequest, response_id: str, stream: bool = False, starting_after: int | None = None
) -> Response:
    """Retrieve a stored response; with `stream`, the events of a background response after `starting_after`."""
    found = await _of_one(
        request, lambda engine: engine.retrieve(response_id, stream=stream, starting_after=starting_after)
    )
    if isinstance(found, dict):
        return JSONResponse(found)
    return EventStream(found, {}, on_end=lambda _: None)


@router.post("/{response_id}/cancel")
async def cancel_response(request: AppRequest, response_id: str) -> dict[str, Any]:
    """Cancel a response that runs in the background."""
    return await _of_one(request, lambda engine: engine.cancel(response_id))


@router.delete("/{response_id}")
async def delete_response(request: AppRequest, response_id: str) -> dict[str, Any]:
    """Delete a stored response."""
    await _of_one(request, lambda engine: engine.delete(response_id))
    return {"id": response_id, "object": "response", "deleted": True}


async def _of_one(request: AppRequest, ask: Callable[[Engine], Awaitable[T]]) -> T:
    """Call `ask` on the engine that has the response; each engine stores its own."""
    bases = request.state["bases"]
    bases.check_ready()
    missing: ResponseNotFound | None = None
    for base in bases:
        if base.supervisor.is_ready:
            try:
                return await ask(base.supervisor.engine)
            except ResponseNotFound as error:
                missing = error
    raise missing or EngineUnavailable("the engine stopped and is restarting: retry in a moment")
