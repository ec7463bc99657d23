"""Whether the process lives, whether it can answer, and how it does."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.engine.supervisor import BaseStatus
from app.exchange.state import AppRequest

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """200 while the process runs its event loop."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "Not yet; the body says what is waited for"}})
async def readyz(request: AppRequest) -> Response:
    """200 once every base model has started or failed, and while one answers; otherwise 503 with the reason.

    Each base model is shown with its status (starting, proving, ready, restarting, failed), what it does at present,
    and since when, in seconds since the epoch.
    """
    bases = request.state["bases"]
    states = {base.name: base.supervisor.state for base in bases}
    models = {
        name: {"status": state.status, "phase": state.phase, "since": round(state.since, 3)}
        for name, state in states.items()
    }
    is_ready = any(state.status is BaseStatus.READY for state in states.values())
    if is_ready and all(base.supervisor.is_settled for base in bases):
        return JSONResponse({"status": "ready", "models": models})
    over = (BaseStatus.READY, BaseStatus.FAILED)
    waiting = next((state.phase for state in states.values() if state.status not in over), "nothing")
    content: dict[str, Any] = {"status": "waiting", "waiting_for": waiting, "models": models}
    return JSONResponse(content, status_code=503, headers={"retry-after": "1"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: AppRequest) -> Response:
    """Prometheus metrics."""
    return Response(request.state["metrics"].render(), media_type=CONTENT_TYPE_LATEST)
