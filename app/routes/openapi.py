"""GET /openapi.json, which /docs shows: every route with its errors, and the parameters of an engine's endpoints."""

import asyncio
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from app.engine.base import Endpoint, Parameters
from app.errors import Code, EngineUnavailable
from app.exchange.state import AppRequest


class ErrorDetail(BaseModel):
    """An error in OpenAI's format."""

    message: str
    type: str
    param: str | None
    code: str
    problems: list[str] | None = None
    """Every fault of an invalid adapter."""


class ErrorBody(BaseModel):
    """The error body of all routes but /v1/messages."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """An error in Anthropic's format."""

    type: str
    message: str
    code: str
    details: dict[str, str]


class AnthropicErrorBody(BaseModel):
    """The error body of /v1/messages."""

    type: str
    error: AnthropicErrorDetail


def failures(*statuses: int, model: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a route's errors: each status with its codes, and a default."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        codes = sorted(code for code in Code if code.answer.status == status)
        described[status] = {
            "description": f"{HTTPStatus(status).phrase}: {', '.join(codes)}",
            "model": model,
        }
    # Without a default, FastAPI would document a 422, which no route returns.
    described["default"] = {"description": "Any other error", "model": model}
    return described


async def openapi(request: AppRequest) -> JSONResponse:
    """Return the OpenAPI document. It has the engine's parameters once the first engine is ready."""
    page = request.app.openapi()
    if request.app.root_path:
        page = {**page, "servers": [{"url": request.app.root_path}]}
    for base in request.state["bases"]:
        try:
            engine = base.supervisor.engine
        except EngineUnavailable:
            continue
        page = with_parameters(page, await asyncio.to_thread(engine.parameters))
        break
    return JSONResponse(page)


def with_parameters(page: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
    """Return a copy of an OpenAPI document with the request bodies of an engine's endpoints."""
    paths = dict(page["paths"])
    for endpoint in Endpoint:
        post = paths[endpoint]["post"]
        (kind, content), *_ = post["requestBody"]["content"].items()
        body = {**post["requestBody"], "content": {kind: {**content, "schema": parameters.bodies[endpoint]}}}
        paths[endpoint] = {**paths[endpoint], "post": {**post, "requestBody": body}}
    components = page.get("components", {})
    schemas = {**parameters.parts, **components.get("schemas", {})}
    return {**page, "paths": paths, "components": {**components, "schemas": schemas}}
