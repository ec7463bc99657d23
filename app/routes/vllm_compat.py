"""vLLM's own load and unload endpoints, so that tooling written for `vllm serve` works unchanged.

Requests and responses are the same. Loading publishes the folder, validates and proves it as any other, and points
the alias `default` at it. Unloading removes the alias and the weights.
"""

from typing import Annotated

from fastapi import APIRouter, Body, Depends
from fastapi.responses import PlainTextResponse

from adapters import DEFAULT_ALIAS, AdapterNotFound, AdapterRef
from app.errors import BadRequest
from app.exchange.state import AppRequest
from app.routes.access import admin
from app.routes.adapters import allowed_folder
from app.routes.openapi import failures

router = APIRouter(dependencies=[Depends(admin)], responses=failures(400, 401, 403, 404, 503))

ACTOR = "http:vllm"

Text = Annotated[str, Body()]


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(
    request: AppRequest, lora_name: Text, lora_path: Text, load_inplace: Annotated[bool, Body()] = False
) -> str:
    """Publish `lora_path` as `lora_name` and serve it. `load_inplace` allows a name that is served already."""
    operations = request.state["operations"]
    if not load_inplace and request.state["served_models"].find(AdapterRef.parse(lora_name)):
        raise BadRequest(
            f"The lora adapter '{lora_name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            param="lora_name",
        )
    folder = allowed_folder(lora_path, request.state["publish_roots"])
    manifest = await operations.publish(folder, lora_name, actor=ACTOR, why="load_lora_adapter")
    await operations.point(lora_name, DEFAULT_ALIAS, manifest.revision, actor=ACTOR, why="load_lora_adapter")
    return f"Success: LoRA adapter '{lora_name}' added successfully."


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(
    request: AppRequest, lora_name: Text, lora_int_id: Annotated[int | None, Body()] = None
) -> str:
    """Stop serving `lora_name`; its revisions stay in the store. `lora_int_id` is accepted and ignored."""
    try:
        await request.state["operations"].remove(
            lora_name, DEFAULT_ALIAS, actor=ACTOR, why="unload_lora_adapter"
        )
    except AdapterNotFound as error:
        raise AdapterNotFound(f"The lora adapter '{lora_name}' cannot be found.") from error
    return f"Success: LoRA adapter '{lora_name}' removed successfully."


@router.post("/adapters", response_class=PlainTextResponse)
async def register_adapter(request: AppRequest, name: Text, src: Text) -> str:
    """Load an adapter as SageMaker does: `/v1/load_lora_adapter` under other names. Ignores `preload` and `pin`."""
    return await load_lora_adapter(request, name, src)


@router.delete("/adapters/{name:path}", response_class=PlainTextResponse)
async def unregister_adapter(request: AppRequest, name: str) -> str:
    """Unload an adapter as SageMaker does."""
    return await unload_lora_adapter(request, name)
