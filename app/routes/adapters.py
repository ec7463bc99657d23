"""Operator routes for adapters: show, point, roll back, prune. All but the GET routes need the admin key."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from adapters import CANARY, DEFAULT_ALIAS, SHADOW, AdapterRef, Manifest, Traffic, diff
from app.errors import EngineUnavailable, FolderNotFound, PathNotAllowed
from app.exchange.state import AppRequest
from app.lifecycle.residency import Residency
from app.routes.access import admin
from app.routes.access import chat as may_look
from app.routes.openapi import failures

router = APIRouter(responses=failures(400, 401, 404, 409, 503))

ACTOR = "http"


class PointRequest(BaseModel):
    """The revision that an alias is to point at."""

    model_config = ConfigDict(extra="forbid")

    revision: str = Field(description="12 hexadecimal digits")
    why: str = Field("", max_length=500, description="Kept in the adapter's log")


class RollbackRequest(BaseModel):
    """The alias to roll back, and the revision to roll back to."""

    model_config = ConfigDict(extra="forbid")

    alias: str = DEFAULT_ALIAS
    revision: str | None = Field(default=None, description="Any earlier revision; null for the previous one")
    why: str = Field(default="", max_length=500, description="Kept in the adapter's log")


class PruneRequest(BaseModel):
    """The number of revisions to keep, besides those that aliases, rollbacks and engines need."""

    model_config = ConfigDict(extra="forbid")

    keep: int = Field(default=5, ge=0, description="Number of newest revisions to keep")
    why: str = Field(default="", max_length=500, description="Kept in the adapter's log")


@router.get("/v1/adapters", dependencies=[Depends(may_look)])
async def list_adapters(request: AppRequest) -> dict[str, Any]:
    """List every alias with its desired and actual revision, and the revisions and waiting requests of each engine.

    An alias is `loading` or `proving` until its revision answers, then `ready`. It is `failed` if the revision cannot
    answer, with the reason in `last_error`. A revision in an engine is `loading`, `proving`, `ready` or `draining`. A
    draining revision gets no new requests; it is removed after its last request, unless a rollback would need it.
    """
    reconciler = request.state["reconciler"]
    served = request.state["served_models"]
    bases = request.state["bases"]
    aliases = [
        {
            "name": name,
            "alias": alias,
            "desired": known.desired,
            "actual": known.actual,
            "status": reconciler.status(name, known),
            "proven": bool(known.answering and known.answering.golden_prompts),
            "resident": any(base.residency.is_resident(f"{name}@{known.actual}") for base in bases),
            "percent": _percent(served.traffic(name), alias),
            "rollback_to": known.previous.revision if known.previous else None,
            "last_error": known.last_error,
        }
        for (name, alias), known in served.aliases()
    ]
    engines = [{"base_model": base.name, **await _engine(base.residency)} for base in bases]
    return {"object": "list", "data": aliases, "engines": engines}


def _percent(traffic: Traffic | None, alias: str) -> float | None:
    """Return the alias's share of the requests for its adapter; None unless it is a canary or shadow."""
    if traffic is None or alias not in (CANARY, SHADOW):
        return None
    return traffic.canary if alias == CANARY else traffic.shadow


async def _engine(residency: Residency) -> dict[str, Any]:
    try:
        held: list[str] | None = await residency.held_by_engine()
    except EngineUnavailable:
        held = None
    residents, waiting, limits = residency.residents(), residency.waiting(), residency.limits
    return {
        "held": held,
        "leases": {resident.loaded.name: residency.leases(resident.loaded.name) for resident in residents},
        "revisions": residency.statuses(),
        "residents": [
            {
                "ref": resident.loaded.name,
                "bytes": resident.size,
                "leases": residency.leases(resident.loaded.name),
                "proven": bool(resident.manifest.golden_prompts),
                "last_used": round(resident.last_used, 3),
            }
            for resident in residents
        ],
        "waiting": waiting,
        "max_resident": limits.max_resident,
        "max_resident_bytes": limits.max_resident_bytes,
        "slots": limits.max_loras,
        "slots_taken": residency.slots_taken,
    }


@router.get("/v1/adapters/{name:path}/diff", dependencies=[Depends(may_look)])
async def diff_revisions(
    request: AppRequest, name: str, old: str, new: str = DEFAULT_ALIAS
) -> dict[str, Any]:
    """Compare two revisions, given as aliases or revisions: which modules moved, and by how much."""
    store = request.state["store"]

    def compare() -> dict[str, Any]:
        manifests: list[Manifest] = [store.get(AdapterRef.parse(f"{name}@{one}")) for one in (old, new)]
        found = diff(*(store.folder(name, manifest.revision) for manifest in manifests))
        return {
            "name": name,
            "old": manifests[0].revision,
            "new": manifests[1].revision,
            **found.model_dump(),
        }

    return await asyncio.to_thread(compare)


@router.get("/v1/adapters/{name:path}", dependencies=[Depends(may_look)])
async def show_adapter(request: AppRequest, name: str) -> dict[str, Any]:
    """Show an adapter: every revision with its manifest, the aliases, the traffic shares, and the log."""
    store = request.state["store"]

    def read() -> dict[str, Any]:
        return {
            "name": name,
            "aliases": store.aliases(name),
            "traffic": store.traffic(name).model_dump(),
            "revisions": [manifest.model_dump(mode="json") for manifest in store.revisions(name)],
            "log": [entry.model_dump(mode="json", exclude_none=True) for entry in store.log(name)],
        }

    return await asyncio.to_thread(read)


@router.put("/v1/adapters/{name:path}/aliases/{alias}", dependencies=[Depends(admin)])
async def point_alias(request: AppRequest, name: str, alias: str, wanted: PointRequest) -> dict[str, Any]:
    """Load and prove a published revision, then point the alias at it."""
    operations = request.state["operations"]
    await operations.point(name, alias, wanted.revision, actor=ACTOR, why=wanted.why)
    return {"name": name, "revision": wanted.revision, "alias": alias}


@router.delete("/v1/adapters/{name:path}/aliases/{alias}", dependencies=[Depends(admin)])
async def remove_alias(request: AppRequest, name: str, alias: str, why: str = "") -> dict[str, Any]:
    """Remove an alias. Its revision leaves the engine and stays in the store."""
    operations = request.state["operations"]
    await operations.remove(name, alias, actor=ACTOR, why=why)
    return {"name": name, "alias": alias, "deleted": True}


@router.post("/v1/adapters/{name:path}/rollback", dependencies=[Depends(admin)])
async def roll_back(request: AppRequest, name: str, wanted: RollbackRequest | None = None) -> dict[str, Any]:
    """Point the alias back at its previous revision, or at any earlier one."""
    wanted = wanted or RollbackRequest()
    operations = request.state["operations"]
    revision = await operations.rollback(name, wanted.alias, to=wanted.revision, actor=ACTOR, why=wanted.why)
    return {"name": name, "revision": revision, "alias": wanted.alias}


@router.post("/v1/adapters/{name:path}/prune", dependencies=[Depends(admin)])
async def prune(request: AppRequest, name: str, wanted: PruneRequest | None = None) -> dict[str, Any]:
    """Remove old revisions that no alias, rollback or engine needs."""
    wanted = wanted or PruneRequest()
    store = request.state["store"]
    removed = await asyncio.to_thread(store.prune, name, keep=wanted.keep, actor=ACTOR, why=wanted.why)
    return {"name": name, "removed": removed}


def allowed_folder(path: str, roots: tuple[Path, ...]) -> Path:
    """Return `path` with links resolved, if it lies below a root.

    Raises FolderNotFound if it would lie below a root but does not exist, else PathNotAllowed. Neither message names a
    host path.
    """
    is_allowed = False
    for root in roots:
        try:
            resolved = (root / path).resolve()
            if resolved.is_relative_to(root):
                is_allowed = True
                if resolved.is_dir():
                    return resolved
        except (OSError, ValueError):
            continue  # too long, or with characters that file names cannot have
    if is_allowed:
        raise FolderNotFound("path: the folder does not exist below the allowed roots", param="path")
    raise PathNotAllowed(
        "path: the folder is not below an allowed root: add its parent to XINGLIN_PUBLISH_ROOTS",
        param="path",
    )
