"""Liveness, readiness and metrics."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.engine.supervisor import BaseStatus
from app.exchange.state import AppRequest

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Return 200 while the process runs its event loop."""
    return {"status": "alive"}


@router.get(
    "/readyz", responses={503: {"description": "Not ready; the body says what the service waits for"}}
)
async def readyz(request: AppRequest) -> Response:
    """Return 200 once every base model has started or failed and while at least one is ready, else 503 with the reason.

    The body shows each base model's status (starting, proving, ready, restarting, failed), its present phase, and when
    that began, in seconds since the epoch.
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
    """Return Prometheus metrics."""
    return Response(request.state["metrics"].render(), media_type=CONTENT_TYPE_LATEST)
