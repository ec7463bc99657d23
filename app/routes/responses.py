"""Stored responses of POST /v1/responses: look at them, stop them, delete them."""

from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.access import chat as may_chat
from app.engine.base import Engine
from app.routes.connection import request_id_headers
from app.routes.event_stream import EventStream

router = APIRouter(prefix="/v1/responses", dependencies=[Depends(may_chat)])


@router.get("/{response_id}")
async def retrieve_response(
    request: Request, response_id: str, stream: bool = False, starting_after: int | None = None
) -> Response:
    """A stored response; with `stream` the events of one made in the background, those after a sequence number."""
    engine: Engine = request.state.supervisor.engine
    found = await engine.retrieve(response_id, stream=stream, starting_after=starting_after)
    if isinstance(found, dict):
        return JSONResponse(found)
    return EventStream(found, ExitStack(), request_id_headers(request), on_end=lambda _: None, keep=None)


@router.post("/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> dict[str, Any]:
    """End a response that is being made in the background."""
    engine: Engine = request.state.supervisor.engine
    return await engine.cancel(response_id)


@router.delete("/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Forget a stored response."""
    engine: Engine = request.state.supervisor.engine
    await engine.delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}
