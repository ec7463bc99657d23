"""The composition root: settings in, a FastAPI app out. Nothing else reads settings."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapters import AdapterError, AdapterStore
from app import errors
from app.access import Access, stored_admin_key
from app.admission import Admission
from app.engine.base import Engine
from app.engine.supervisor import Supervisor, in_daemon_thread
from app.metrics import Metrics
from app.reconciler import Reconciler
from app.routes import adapters, chat, health, models, vllm_compat
from app.served_models import ServedModels
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.vllm import VllmEngine

logger = logging.getLogger(__name__)


class State(TypedDict):
    """What routes find in `request.state`."""

    access: Access
    admission: Admission
    metrics: Metrics
    publish_roots: tuple[Path, ...]
    reconciler: Reconciler
    served_models: ServedModels
    started_at: int
    supervisor: Supervisor


def create_app(
    settings: Settings,
    *,
    on_ready: Callable[[ServedModels], None] = lambda _: None,
    on_give_up: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Build the app. Its lifespan starts the engine in the background, so that health can be asked at once.

    `on_ready` is called whenever requests can be answered, `on_give_up` when they never will be.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        metrics = Metrics()
        served = ServedModels(settings.base_model_name)
        reconciler = Reconciler(
            AdapterStore(settings.store_dir),
            served,
            metrics,
            allow_unproven=settings.allow_unproven,
            max_adapters=settings.max_adapters,
            interval=settings.reconcile_seconds,
        )

        def announce() -> None:
            metrics.engine_starts.inc()
            on_ready(served)

        supervisor = Supervisor(
            lambda: _build_engine(settings),
            prepare=reconciler.attach,
            on_ready=announce,
            on_death=reconciler.detach,
        )
        tasks = [
            asyncio.create_task(_run_or_give_up(supervisor, on_give_up), name="supervisor"),
            asyncio.create_task(reconciler.run(), name="reconciler"),
        ]
        key = (
            settings.admin_key.get_secret_value()
            if settings.admin_key
            else stored_admin_key(settings.data_dir)
        )
        try:
            yield State(
                access=Access(key, is_chat_open=settings.is_loopback),
                admission=Admission(settings.max_concurrent_requests, metrics.in_flight),
                metrics=metrics,
                publish_roots=tuple(root.resolve() for root in (settings.data_dir, *settings.publish_roots)),
                reconciler=reconciler,
                served_models=served,
                started_at=int(time.time()),
                supervisor=supervisor,
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="Xinglin 杏林", version="0.1.0", lifespan=lifespan)
    for module in (chat, models, adapters, vllm_compat, health):
        app.include_router(module.router)
    for kind in (errors.ApiError, AdapterError):
        app.add_exception_handler(kind, _error_response)
    app.add_exception_handler(RequestValidationError, _validation_response)
    app.add_exception_handler(HTTPException, _http_response)
    app.add_exception_handler(Exception, _unexpected_response)
    return app


async def _build_engine(settings: Settings) -> Engine:
    def build() -> "VllmEngine":
        # Imported late and here: it takes ten seconds, in which health can be asked already.
        from app.engine.vllm import EngineOptions, VllmEngine  # noqa: PLC0415

        options = EngineOptions(
            model=settings.base_model,
            name=settings.base_model_name,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_lora_rank=settings.max_lora_rank,
            max_loras=settings.max_loras,
            max_adapters=settings.max_adapters,
            kv_cache_gib=settings.kv_cache_gib,
            gpu_memory_utilization=settings.gpu_memory_utilization,
        )
        return VllmEngine.build(options)

    engine = await in_daemon_thread(build)
    await engine.start()
    return engine


async def _run_or_give_up(supervisor: Supervisor, on_give_up: Callable[[], None]) -> None:
    try:
        await supervisor.run()
    except Exception:
        logger.exception("giving up: the engine cannot be started")
        on_give_up()


def _error_response(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(errors.body(error), errors.row(error).status, errors.headers(error))


def _validation_response(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's list of problems as one OpenAI error; the offending values are not repeated."""
    first = cast(RequestValidationError, error).errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    missing = first["type"] == "missing"
    code = (
        "invalid_json"
        if first["type"] == "json_invalid"
        else "missing_required_parameter"
        if missing
        else None
    )
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return _error_response(request, errors.BadRequest(message, code=code or "invalid_value", param=param))


def _http_response(_: Request, error: Exception) -> JSONResponse:
    """Starlette's own 404 and 405."""
    error = cast(HTTPException, error)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    detail: dict[str, Any] = {
        "message": f"{error.detail}: GET /docs lists what there is",
        "type": "invalid_request_error",
        "param": None,
        "code": code,
    }
    return JSONResponse({"error": detail}, error.status_code, error.headers)


def _unexpected_response(request: Request, error: Exception) -> JSONResponse:
    """A defect of ours; Starlette logs the traceback, the client learns that it is not to blame."""
    return _error_response(
        request, errors.EngineFailed("the service failed on this request; its log says why")
    )
