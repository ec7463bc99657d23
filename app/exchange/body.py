"""Reads the body of a request: JSON with a `model`, limited in size and time."""

import asyncio
import json
from typing import Any

from fastapi import Request

from app.engine.base import Endpoint
from app.errors import BadRequest, Code

MAX_BODY_BYTES = 4 << 20  # parsing blocks the event loop; the longest contexts fit
BODY_SECONDS = 60

_BY_FIELD = {"messages": Endpoint.CHAT, "prompt": Endpoint.COMPLETIONS, "input": Endpoint.RESPONSES}
_SAGEMAKERS_ADAPTER = "x-amzn-sagemaker-adapter-identifier"


def meant(body: dict[str, Any]) -> Endpoint:
    """Return the endpoint that a body is meant for, by its fields. Raises BadRequest."""
    for field, endpoint in _BY_FIELD.items():
        if field in body:
            return endpoint
    raise BadRequest(
        "one of messages, prompt and input is required",
        code=Code.MISSING_REQUIRED_PARAMETER,
        param="messages",
    )


async def read_body(request: Request[Any]) -> dict[str, Any]:
    """Return the JSON object in the body, whose `model` is a string. Raises BadRequest, ClientDisconnect."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            content = await _content(request)
    except TimeoutError as error:
        raise BadRequest(
            f"the request took longer than {BODY_SECONDS} s to arrive", code=Code.REQUEST_TIMEOUT
        ) from error
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request body is not JSON", code=Code.INVALID_JSON) from error
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object", code=Code.INVALID_JSON)
    if adapter := request.headers.get(_SAGEMAKERS_ADAPTER):
        body["model"] = adapter
    if "model" not in body:  # no default: a client must name the weights that answer
        raise BadRequest(
            "model: this parameter is required", code=Code.MISSING_REQUIRED_PARAMETER, param="model"
        )
    if not isinstance(body["model"], str):
        raise BadRequest("model: must be a string", code=Code.INVALID_VALUE, param="model")
    return body


async def _content(request: Request[Any]) -> bytearray:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise BadRequest(
                f"the request is larger than {MAX_BODY_BYTES >> 20} MiB", code=Code.REQUEST_TOO_LARGE
            )
    return content
