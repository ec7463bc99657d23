"""GET /v1/models: the served models, in OpenAI's shape with vLLM's extra fields."""

from typing import Any

from fastapi import APIRouter, Depends

from adapters import Manifest
from app.errors import EngineUnavailable
from app.exchange.choice import choose_model
from app.exchange.state import AppRequest
from app.lifecycle.bases import Base
from app.routes.access import chat as may_chat
from app.routes.openapi import failures

router = APIRouter(dependencies=[Depends(may_chat)], responses=failures(401, 404))


@router.get("/v1/models")
async def list_models(request: AppRequest) -> dict[str, Any]:
    """List the served models: the base models first, then every adapter that an alias points at."""
    return {"object": "list", "data": _cards(request)}


@router.get("/v1/models/{model:path}")
async def show_model(request: AppRequest, model: str) -> dict[str, Any]:
    """Show one served model."""
    for card in _cards(request):
        if card["id"] == model:
            return card
    choice = await choose_model(request, model)
    return _card(request, model, request.state["bases"].answering(choice), choice.manifest)


def _cards(request: AppRequest) -> list[dict[str, Any]]:
    bases = request.state["bases"]
    cards = [_card(request, base.name, base, None) for base in bases]
    named = request.state["served_models"].named()
    return cards + [_card(request, name, bases.of(manifest), manifest) for name, manifest in named]


def _card(request: AppRequest, id_: str, base: Base, manifest: Manifest | None) -> dict[str, Any]:
    try:
        max_model_len = base.supervisor.engine.max_model_len
    except EngineUnavailable:
        max_model_len = None
    return {
        "id": id_,
        "object": "model",
        "created": int(manifest.created_at.timestamp()) if manifest else request.state["started_at"],
        "owned_by": "xinglin",
        "root": manifest.ref if manifest else id_,
        "parent": base.name if manifest else None,
        "max_model_len": max_model_len,
        "permission": [],
    }
