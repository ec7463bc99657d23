"""Whether the process lives, whether it can answer, and how it does."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """200 while the process runs its event loop."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 once requests can be answered; 503 with what is waited for until then, and while rebuilding."""
    supervisor = request.state.supervisor
    if supervisor.is_ready:
        return JSONResponse({"status": "ready"})
    content: dict[str, Any] = {"status": "waiting", "waiting_for": supervisor.waiting_for}
    return JSONResponse(content, status_code=503, headers={"retry-after": "1"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(request.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)
