"""GET /v1/models: what a client may send as `model`, in OpenAI's shape with vLLM's extra fields."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from adapters import Manifest
from app.access.keys import chat as may_chat
from app.errors import EngineUnavailable, ModelNotFound
from app.lifecycle.bases import Base
from app.routes.openapi import failures

router = APIRouter(dependencies=[Depends(may_chat)], responses=failures(401, 404))


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base models first, then every adapter that is pointed at."""
    return {"object": "list", "data": _cards(request)}


@router.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> dict[str, Any]:
    """One served model."""
    for card in _cards(request):
        if card["id"] == model:
            return card
    served = request.state.served_models
    try:
        manifest = served.choose(model).manifest
    except ModelNotFound:
        manifest = await request.state.operations.published(model)
    if manifest is None:
        raise served.not_found(model)
    return _card(request, model, manifest)


def _cards(request: Request) -> list[dict[str, Any]]:
    cards = [_card(request, base.name, None, base) for base in request.state.bases]
    return cards + [_card(request, name, manifest) for name, manifest in request.state.served_models.named()]


def _card(request: Request, id_: str, manifest: Manifest | None, base: Base | None = None) -> dict[str, Any]:
    base = base or request.state.bases.of(manifest)
    try:
        max_model_len = base.supervisor.engine.max_model_len
    except EngineUnavailable:
        max_model_len = None
    return {
        "id": id_,
        "object": "model",
        "created": int(manifest.created_at.timestamp()) if manifest else request.state.started_at,
        "owned_by": "xinglin",
        "root": manifest.ref if manifest else id_,
        "parent": base.name if manifest else None,
        "max_model_len": max_model_len,
        "permission": [],
    }
