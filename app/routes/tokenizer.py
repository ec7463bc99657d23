"""GET /tokenizer_info, as `vllm serve --enable-tokenizer-info-endpoint` offers it; here by a setting too."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from app.access.keys import chat as may_chat
from app.routes.openapi import failures

router = APIRouter(dependencies=[Depends(may_chat)], responses=failures(401, 404, 503))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """The configuration of the tokenizer of `model`'s base model, or of the first base model."""
    bases = request.state.bases
    if model is None:
        base = next(iter(bases))
    else:
        choice = request.state.served_models.choose(model)
        base = bases.of(choice.manifest) if choice.manifest else bases.named(choice.base)
    info: dict[str, Any] = await base.supervisor.engine.tokenizer_info()
    return info
