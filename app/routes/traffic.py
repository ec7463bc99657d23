"""Canary and shadow: try a revision on a share of an adapter's requests. All routes need the admin key."""

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from adapters import CANARY, SHADOW
from app.exchange.state import AppRequest
from app.routes.access import admin
from app.routes.adapters import ACTOR
from app.routes.openapi import failures

router = APIRouter(dependencies=[Depends(admin)], responses=failures(400, 401, 404, 409, 503))


class ShareRequest(BaseModel):
    """The revision of a canary or shadow, and its share of the requests."""

    model_config = ConfigDict(extra="forbid")

    percent: float = Field(
        ge=0, le=100, allow_inf_nan=False, description="Share of the requests for the bare name"
    )
    revision: str | None = Field(
        default=None, description="12 hexadecimal digits; null keeps the present revision"
    )
    why: str = Field("", max_length=500, description="Kept in the adapter's log")


class WhyRequest(BaseModel):
    """The reason for a change."""

    model_config = ConfigDict(extra="forbid")

    why: str = Field("", max_length=500, description="Kept in the adapter's log")


@router.put("/v1/adapters/{name:path}/canary")
async def set_canary(request: AppRequest, name: str, wanted: ShareRequest) -> dict[str, Any]:
    """Prove a revision and let it answer a share of the requests, always for the same sessions."""
    return await _split(request, name, CANARY, wanted)


@router.post("/v1/adapters/{name:path}/canary/promote")
async def promote_canary(request: AppRequest, name: str, wanted: WhyRequest | None = None) -> dict[str, Any]:
    """Point `default` at the canary's revision, and end the canary."""
    operations = request.state["operations"]
    revision = await operations.promote(name, actor=ACTOR, why=wanted.why if wanted else "")
    return {"name": name, "revision": revision, "alias": "default"}


@router.delete("/v1/adapters/{name:path}/canary")
async def abort_canary(request: AppRequest, name: str, why: str = "") -> dict[str, Any]:
    """End the canary: new requests go to `default` at once."""
    return await _end(request, name, CANARY, why)


@router.put("/v1/adapters/{name:path}/shadow")
async def set_shadow(request: AppRequest, name: str, wanted: ShareRequest) -> dict[str, Any]:
    """Prove a revision and send it copies of a share of the requests. Its answers are only compared."""
    return await _split(request, name, SHADOW, wanted)


@router.delete("/v1/adapters/{name:path}/shadow")
async def end_shadow(request: AppRequest, name: str, why: str = "") -> dict[str, Any]:
    """End the shadow."""
    return await _end(request, name, SHADOW, why)


async def _split(request: AppRequest, name: str, alias: str, wanted: ShareRequest) -> dict[str, Any]:
    operations = request.state["operations"]
    revision = await operations.split(
        name, alias, wanted.revision, wanted.percent, actor=ACTOR, why=wanted.why
    )
    return {"name": name, "revision": revision, "alias": alias, "percent": wanted.percent}


async def _end(request: AppRequest, name: str, alias: str, why: str) -> dict[str, Any]:
    operations = request.state["operations"]
    await operations.remove(name, alias, actor=ACTOR, why=why)
    return {"name": name, "alias": alias, "deleted": True}
