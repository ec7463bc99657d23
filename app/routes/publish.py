"""POST /v1/adapters: publish an adapter from a folder, an upload or a source. Needs the admin key."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from adapters import DEFAULT_ALIAS
from adapters.ref import check_alias, check_name
from adapters.wording import in_words
from app.errors import BadRequest, Code
from app.exchange.connection import CLIENT_LEFT
from app.exchange.state import AppRequest
from app.fetch import parse_source
from app.routes.access import admin
from app.routes.adapters import ACTOR, allowed_folder
from app.routes.openapi import failures

router = APIRouter(dependencies=[Depends(admin)], responses=failures(400, 401, 403, 404, 503))

_MAX_JSON_BYTES = 1 << 20


class PublishRequest(BaseModel):
    """The adapter to publish: a folder on the server's disk, a source, or an uploaded file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="The adapter's name")
    path: str | None = Field(
        None, description="Folder with adapter_config.json: an absolute path, or relative to an allowed root"
    )
    source: str | None = Field(
        None,
        description="hf://org/repo@revision, s3://bucket/folder/, https://host/file.tar.gz, ...; fetched in the "
        "background: the response is an import to poll",
    )
    alias: str | None = Field(
        DEFAULT_ALIAS, description="Alias to point at the revision once it is proved; null or empty for none"
    )
    why: str = Field("", max_length=500, description="Kept in the adapter's log")

    @model_validator(mode="after")
    def _from_one_place(self) -> "PublishRequest":
        if self.path is not None and self.source is not None:
            raise ValueError("give path or source, not both")
        return self


_DOCUMENTED = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": PublishRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": ".tar.gz or .zip"},
                        "name": {"type": "string"},
                        "alias": {"type": "string", "default": DEFAULT_ALIAS},
                        "why": {"type": "string"},
                    },
                }
            },
        },
    }
}


@router.post("/v1/adapters", openapi_extra=_DOCUMENTED)
async def publish_adapter(request: AppRequest) -> Response:
    """Publish an adapter. With an alias, load and prove the revision, then point the alias at it.

    JSON with `path` publishes a folder, with `source` starts an import (202); multipart uploads an archive.
    """
    try:
        return await _publish_adapter(request)
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)


async def _publish_adapter(request: AppRequest) -> Response:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        async with _upload(request) as (wanted, folder):
            return JSONResponse(await _publish(request, wanted, folder))
    wanted = _checked(await _json(request))
    if wanted.source is not None:
        source = parse_source(wanted.source, request.state["sources"])

        async def then(folder: Path, resolved: str) -> dict[str, Any]:
            return await _publish(request, wanted, folder, resolved)

        imports = request.state["imports"]
        started = imports.start(source, then)
        return JSONResponse(_shown(started), 202, {"location": f"/v1/imports/{started.id}"})
    if wanted.path is None:
        raise BadRequest(
            "path is missing: give `path` (a folder) or `source`, or upload a file as multipart/form-data",
            code=Code.MISSING_REQUIRED_PARAMETER,
            param="path",
        )
    folder = allowed_folder(wanted.path, request.state["publish_roots"])
    return JSONResponse(await _publish(request, wanted, folder))


@router.get("/v1/imports")
async def list_imports(request: AppRequest) -> dict[str, Any]:
    """List the imports: those in progress, and the last finished ones."""
    return {"object": "list", "data": [_shown(one) for one in request.state["imports"].list()]}


@router.get("/v1/imports/{id}")
async def show_import(request: AppRequest, id: str) -> dict[str, Any]:
    """Show the progress and result of an import."""
    return _shown(request.state["imports"].get(id))


@router.delete("/v1/imports/{id}")
async def cancel_import(request: AppRequest, id: str) -> dict[str, Any]:
    """Cancel an import and remove its files."""
    await request.state["imports"].cancel(id)
    return _shown(request.state["imports"].get(id))


def _shown(one: Any) -> dict[str, Any]:
    return {"object": "import", **one.shown()}


async def _publish(
    request: AppRequest, wanted: PublishRequest, folder: Path, source: str | None = None
) -> dict[str, Any]:
    operations = request.state["operations"]
    manifest = await operations.publish(folder, wanted.name, actor=ACTOR, why=wanted.why, source=source)
    if wanted.alias:
        await operations.point(wanted.name, wanted.alias, manifest.revision, actor=ACTOR, why=wanted.why)
    return {"name": manifest.name, "revision": manifest.revision, "alias": wanted.alias or None}


async def _json(request: AppRequest) -> Any:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > _MAX_JSON_BYTES:
            raise BadRequest("the request is larger than 1 MiB", code=Code.REQUEST_TOO_LARGE)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request body is not JSON", code=Code.INVALID_JSON) from error


def _checked(fields: Any) -> PublishRequest:
    """Return the request, validated before anything is fetched or unpacked. Raises BadRequest, InvalidRef."""
    try:
        wanted = PublishRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        code = Code.MISSING_REQUIRED_PARAMETER if first["type"] == "missing" else Code.INVALID_VALUE
        message = f"{param}: {in_words(first)}" if param else in_words(first)
        raise BadRequest(message, code=code, param=param) from error
    check_name(wanted.name)
    if wanted.alias:
        check_alias(wanted.alias)
    return wanted


@asynccontextmanager
async def _upload(request: AppRequest) -> AsyncIterator[tuple[PublishRequest, Path]]:
    """Yield the fields and the unpacked folder of a multipart upload; the folder is removed afterwards."""
    limit: int = request.state["imports"].max_bytes

    async def limited() -> AsyncIterator[bytes]:
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise BadRequest(
                    f"the upload is larger than {limit / 2**30:g} GiB: raise XINGLIN_MAX_ADAPTER_GIB",
                    code=Code.REQUEST_TOO_LARGE,
                    param="file",
                )
            yield chunk

    try:
        form = await MultiPartParser(request.headers, limited(), max_files=1, max_fields=8).parse()  # type: ignore[arg-type]
    except (MultiPartException, KeyError) as error:
        raise BadRequest(
            f"the multipart body cannot be read: {error}", code=Code.INVALID_MULTIPART
        ) from error
    async with _closing(form):
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise BadRequest(
                "file: upload the adapter as a .tar.gz or .zip file",
                code=Code.MISSING_REQUIRED_PARAMETER,
                param="file",
            )
        wanted = _checked(fields)
        if wanted.path is not None or wanted.source is not None:
            raise BadRequest("give only one of file, path and source", code=Code.INVALID_VALUE)
        with tempfile.TemporaryDirectory(dir=request.state["imports"].folder) as temporary:
            archive = Path(temporary, "upload")
            await asyncio.to_thread(_save, file, archive)
            async with request.state["imports"].unpack_upload(archive) as folder:
                yield wanted, folder


def _save(file: UploadFile, path: Path) -> None:
    with path.open("wb") as copy:
        shutil.copyfileobj(file.file, copy)


@asynccontextmanager
async def _closing(form: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await form.close()
