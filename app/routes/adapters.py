"""What operators do with adapters: see, publish, point, roll back. All but seeing needs the admin key."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from adapters import DEFAULT_ALIAS, AdapterRef
from app.access import admin
from app.access import chat as may_look
from app.errors import EngineUnavailable, PathNotAllowed
from app.reconciler import Reconciler

router = APIRouter()

ACTOR = "http"


class PublishRequest(BaseModel):
    """A folder on the server's own disk, below one of its publish roots."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="The adapter's name")
    path: str = Field(description="The folder that holds adapter_config.json, absolute or below a root")
    alias: str | None = Field(
        DEFAULT_ALIAS, description="Alias to point at it once it proved itself; null for none"
    )
    why: str = Field("", max_length=500, description="Kept in the adapter's log")


class PointRequest(BaseModel):
    """Which revision an alias shall point at."""

    model_config = ConfigDict(extra="forbid")

    revision: str = Field(description="12 hexadecimal digits")
    why: str = Field("", max_length=500, description="Kept in the adapter's log")


class RollbackRequest(BaseModel):
    """Which alias shall go back to its revision before."""

    model_config = ConfigDict(extra="forbid")

    alias: str = DEFAULT_ALIAS
    why: str = Field(default="", max_length=500, description="Kept in the adapter's log")


@router.get("/v1/adapters", dependencies=[Depends(may_look)])
async def list_adapters(request: Request) -> dict[str, Any]:
    """Every alias with its desired and actual revision, and what the engine's workers hold."""
    reconciler: Reconciler = request.state.reconciler
    try:
        held: list[str] | None = await reconciler.held_by_engine()
    except EngineUnavailable:
        held = None
    aliases = [
        {
            "name": name,
            "alias": alias,
            "desired": status.desired,
            "actual": status.actual,
            "status": status.state,
            "proven": status.is_proven,
            "last_error": status.last_error,
        }
        for (name, alias), status in sorted(reconciler.status.items())
    ]
    return {"object": "list", "data": aliases, "engine": {"held": held, "leases": reconciler.leases()}}


@router.post("/v1/adapters", dependencies=[Depends(admin)])
async def publish_adapter(request: Request, wanted: PublishRequest) -> dict[str, Any]:
    """Publish a folder; with an alias, load and prove the revision and only then point the alias at it."""
    reconciler: Reconciler = request.state.reconciler
    folder = allowed_folder(wanted.path, request.state.publish_roots)
    if wanted.alias is not None:
        AdapterRef.parse(f"{wanted.name}@{wanted.alias}")
    manifest = await reconciler.publish(folder, wanted.name, actor=ACTOR, why=wanted.why)
    if wanted.alias is not None:
        await reconciler.point(wanted.name, wanted.alias, manifest.revision, actor=ACTOR, why=wanted.why)
    return {"name": manifest.name, "revision": manifest.revision, "alias": wanted.alias}


@router.put("/v1/adapters/{name}/aliases/{alias}", dependencies=[Depends(admin)])
async def point_alias(request: Request, name: str, alias: str, wanted: PointRequest) -> dict[str, Any]:
    """Load and prove a published revision, then point the alias at it."""
    reconciler: Reconciler = request.state.reconciler
    await reconciler.point(name, alias, wanted.revision, actor=ACTOR, why=wanted.why)
    return {"name": name, "revision": wanted.revision, "alias": alias}


@router.post("/v1/adapters/{name}/rollback", dependencies=[Depends(admin)])
async def roll_back(request: Request, name: str, wanted: RollbackRequest | None = None) -> dict[str, Any]:
    """Point the alias back at its revision before."""
    wanted = wanted or RollbackRequest()
    reconciler: Reconciler = request.state.reconciler
    revision = await reconciler.rollback(name, wanted.alias, actor=ACTOR, why=wanted.why)
    return {"name": name, "revision": revision, "alias": wanted.alias}


def allowed_folder(path: str, roots: tuple[Path, ...]) -> Path:
    """`path` with links resolved, if it lies below a root. Raises PathNotAllowed, which names no host path."""
    if "\0" not in path:
        for root in roots:
            resolved = (root / path).resolve()
            if resolved.is_relative_to(root) and resolved.is_dir():
                return resolved
    raise PathNotAllowed(
        "path: no folder of that name lies below the roots this service may read; add its parent to "
        "XINGLIN_PUBLISH_ROOTS",
        param="path",
    )
