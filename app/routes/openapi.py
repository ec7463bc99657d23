"""GET /openapi.json, which /docs shows: every route, and every parameter of those that an engine answers."""

import asyncio
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import Request

from app.engine.base import Endpoint, Parameters
from app.errors import EngineUnavailable


async def openapi(request: Request) -> JSONResponse:
    """The page; parameters that engines alone know are in it from when the first one is up."""
    page = request.app.openapi()
    if request.app.root_path:
        page = {**page, "servers": [{"url": request.app.root_path}]}
    for host in request.state.hosts:
        try:
            engine = host.engine
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
