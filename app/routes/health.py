"""Whether the process lives, whether it can answer, and how it does."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from app.lifecycle.bases import Host, Hosts

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """200 while the process runs its event loop."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "Not yet; the body says what is waited for"}})
async def readyz(request: Request) -> Response:
    """200 once every base model answers that can, and while one does; until then 503 with what is waited for."""
    hosts: Hosts = request.state.hosts
    models = {host.name: _standing(host) for host in hosts}
    is_ready = any(host.supervisor.is_ready for host in hosts)
    has_come = all(host.has_come or host.failure is not None for host in hosts)
    if is_ready and has_come:
        return JSONResponse({"status": "ready", "models": models})
    waiting = next((host.supervisor.waiting_for for host in hosts if not host.is_settled), "nothing")
    content: dict[str, Any] = {"status": "waiting", "waiting_for": waiting, "models": models}
    return JSONResponse(content, status_code=503, headers={"retry-after": "1"})


def _standing(host: Host) -> dict[str, str]:
    if host.failure is not None:
        return {"status": "failed"}  # why may name host paths: the log says it
    if host.supervisor.is_ready:
        return {"status": "ready"}
    return {"status": "waiting", "waiting_for": host.supervisor.waiting_for}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(request.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)
