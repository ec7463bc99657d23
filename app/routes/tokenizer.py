"""GET /tokenizer_info, as in `vllm serve --enable-tokenizer-info-endpoint`; off unless a setting enables it."""

from typing import Any

from fastapi import APIRouter, Depends

from app.exchange.choice import choose_model
from app.exchange.state import AppRequest
from app.routes.access import chat as may_chat
from app.routes.openapi import failures

router = APIRouter(dependencies=[Depends(may_chat)], responses=failures(401, 404, 503))


@router.get("/tokenizer_info")
async def tokenizer_info(request: AppRequest, model: str | None = None) -> dict[str, Any]:
    """Return the tokenizer configuration of `model`'s base model, by default of the first base model."""
    bases = request.state["bases"]
    base = bases.answering(await choose_model(request, model)) if model else next(iter(bases))
    return await base.supervisor.engine.tokenizer_info()
