"""Resolves a model name to a revision or base model, including revisions that no alias points at."""

from app.errors import ModelNotFound
from app.exchange.state import AppRequest
from app.lifecycle.served_models import Choice


async def choose_model(request: AppRequest, model: str, session: str | None = None) -> Choice:
    """Choose what answers a request for `model`. Raises ModelNotFound, AdapterUnavailable."""
    try:
        return request.state["served_models"].choose(model, session)
    except ModelNotFound:
        manifest = await request.state["operations"].published(model)
        if manifest is None:
            raise
        return Choice(manifest)
