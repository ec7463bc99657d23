"""GET /openapi.json, which /docs shows: every route, how it fails, and every parameter of an engine's endpoints."""

import asyncio
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from app.engine.base import Endpoint, Parameters
from app.errors import Code, EngineUnavailable
from app.exchange.state import AppRequest


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str
    problems: list[str] | None = None
    """Of a refused adapter, one by one."""


class ErrorBody(BaseModel):
    """Every error but those of /v1/messages."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong, in Anthropic's form."""

    type: str
    message: str
    code: str
    details: dict[str, str]


class AnthropicErrorBody(BaseModel):
    """Errors of /v1/messages."""

    type: str
    error: AnthropicErrorDetail


def failures(*statuses: int, model: type[BaseModel] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """How routes may fail, for the page: each status with the codes that it stands for, and the rest."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        codes = sorted(code for code in Code if code.answer.status == status)
        described[status] = {
            "description": f"{HTTPStatus(status).phrase}: {', '.join(codes)}",
            "model": model,
        }
    # FastAPI would name 422 without it, which nothing here answers.
    described["default"] = {"description": "Any other failure", "model": model}
    return described


async def openapi(request: AppRequest) -> JSONResponse:
    """The page; parameters that engines alone know are in it from when the first one is up."""
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
    """A copy of an OpenAPI document in which the bodies of an engine's endpoints are described."""
    paths = dict(page["paths"])
    for endpoint in Endpoint:
        post = paths[endpoint]["post"]
        (kind, content), *_ = post["requestBody"]["content"].items()
        body = {**post["requestBody"], "content": {kind: {**content, "schema": parameters.bodies[endpoint]}}}
        paths[endpoint] = {**paths[endpoint], "post": {**post, "requestBody": body}}
    components = page.get("components", {})
    schemas = {**parameters.parts, **components.get("schemas", {})}
    return {**page, "paths": paths, "components": {**components, "schemas": schemas}}
