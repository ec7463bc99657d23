"""The composition root: settings in, a FastAPI app out. Nothing else reads settings."""

import asyncio
import functools
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from adapters import AdapterError, AdapterStore
from adapters.wording import in_words
from app import errors
from app.access.admission import Admission
from app.access.keys import Access, stored_admin_key
from app.engine.base import Endpoint, Engine
from app.engine.supervisor import Supervisor, in_daemon_thread
from app.exchange.connection import RequestIds, request_id_headers
from app.exchange.shadow import Shadow
from app.fetch.imports import Imports
from app.lifecycle.bases import Host, Hosts
from app.lifecycle.loader import Loader
from app.lifecycle.reconciler import Reconciler
from app.lifecycle.residency import Limits, Residency
from app.lifecycle.served_models import ServedModels
from app.metrics import Metrics
from app.routes import (
    adapters,
    answers,
    health,
    models,
    openapi,
    probes,
    publish,
    responses,
    tokenizer,
    traffic,
    vllm_compat,
)
from app.settings import BaseModelSettings, Settings
from app.vllm_metrics import VllmMetrics

_MOST_PROBLEMS = 5  # of one request are told

if TYPE_CHECKING:
    from app.engine.vllm import VllmEngine

logger = logging.getLogger(__name__)


class State(TypedDict):
    """What routes find in `request.state`."""

    access: Access
    admission: Admission
    hosts: Hosts
    imports: Imports
    metrics: Metrics
    publish_roots: tuple[Path, ...]
    reconciler: Reconciler
    served_models: ServedModels
    shadow: Shadow
    sources: tuple[str, ...]
    started_at: int


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
        bases = settings.bases()
        served = ServedModels([str(base.served_model_name) for base in bases])
        store = AdapterStore(settings.store_dir)
        hosts = Hosts([_host(settings, base, store, metrics, served) for base in bases])
        metrics.registry.register(VllmMetrics(hosts))
        reconciler = Reconciler(
            store,
            served,
            hosts,
            metrics,
            allow_revisions=settings.allow_revisions,
            interval=settings.reconcile_seconds,
        )
        shadow = Shadow(settings.data_dir / "shadow", hosts, metrics, keep_texts=settings.shadow_texts)

        def announce(host: Host) -> None:
            host.has_come = True
            # What is there now stays: a full collection that walked through it would stall every stream.
            gc.unfreeze()  # of an engine before this one
            gc.collect()
            gc.freeze()
            metrics.engine_starts.inc()
            if all(host.is_settled for host in hosts):
                on_ready(served)

        one_at_a_time = asyncio.Lock()
        """Engines that start together take each other's memory for used, and each other's cores."""

        async def build(base: BaseModelSettings) -> Engine:
            async with one_at_a_time:
                return await _build_engine(settings, base)

        for host, base in zip(hosts, bases, strict=True):
            host.supervisor = Supervisor(
                functools.partial(build, base),
                prepare=functools.partial(reconciler.attach, host),
                on_ready=functools.partial(announce, host),
                on_death=functools.partial(reconciler.detach, host),
                stall_seconds=settings.stall_seconds,
            )

        async def keep(host: Host) -> None:
            try:
                await host.supervisor.run()
            except Exception as error:
                logger.exception("giving up: the engine of %s cannot be started", host.name)
                host.failure = str(error)
                if all(other.failure is not None for other in hosts):
                    on_give_up()
                elif all(other.is_settled for other in hosts):
                    on_ready(served)

        imports = Imports(
            settings.data_dir,
            allowed=settings.sources,
            private_networks=settings.private_networks,
            max_bytes=int(settings.max_adapter_gib * 2**30),
        )
        tasks = [
            *(asyncio.create_task(keep(host), name=f"supervisor of {host.name}") for host in hosts),
            asyncio.create_task(reconciler.run(), name="reconciler"),
            asyncio.create_task(shadow.run(), name="shadow"),
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
                hosts=hosts,
                imports=imports,
                metrics=metrics,
                publish_roots=tuple(root.resolve() for root in (settings.data_dir, *settings.publish_roots)),
                reconciler=reconciler,
                served_models=served,
                shadow=shadow,
                sources=settings.sources,
                started_at=int(time.time()),
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            shadow.close()
            await imports.close()

    return _app(settings, lifespan)


def _app(settings: Settings, lifespan: Any) -> FastAPI:
    page = Route("/openapi.json", openapi.openapi, include_in_schema=False)  # found before FastAPI's own
    app = FastAPI(
        title="Xinglin 杏林",
        version="0.1.0",
        lifespan=lifespan,
        routes=[page],
        root_path=settings.root_path,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-adapter-revision", "x-truncated", "retry-after"],
        )
    app.add_middleware(RequestIds)
    if settings.tokenizer_info:
        app.include_router(tokenizer.router)
    for module in (answers, responses, models, publish, adapters, traffic, vllm_compat, health, probes):
        app.include_router(module.router)
    for kind in (errors.ApiError, AdapterError):
        app.add_exception_handler(kind, _error_response)
    app.add_exception_handler(RequestValidationError, _validation_response)
    app.add_exception_handler(HTTPException, _http_response)
    app.add_exception_handler(Exception, _unexpected_response)
    return app


def _host(
    settings: Settings, base: BaseModelSettings, store: AdapterStore, metrics: Metrics, served: ServedModels
) -> Host:
    loader = Loader(
        store,
        metrics,
        recorded_dir=settings.data_dir / "recorded",
        allow_unproven=settings.allow_unproven,
    )
    limits = Limits(
        max_resident=base.max_resident,
        max_resident_bytes=int(base.max_resident_gib * 2**30),
        max_loras=base.max_loras,
        wait_seconds=settings.adapter_wait_seconds,
    )
    residency = Residency(
        store,
        metrics,
        limits,
        loader,
        is_wanted=lambda ref: settings.allow_revisions or served.is_wanted(ref),
    )
    return Host(str(base.served_model_name), residency)


async def _build_engine(settings: Settings, base: BaseModelSettings) -> Engine:
    def build() -> "VllmEngine":
        # Imported late and here: it takes ten seconds, in which health can be asked already.
        from app.engine.vllm import VllmEngine  # noqa: PLC0415
        from app.engine.vllm_arguments import EngineOptions  # noqa: PLC0415

        options = EngineOptions(
            model=str(base.model),
            name=str(base.served_model_name),
            dtype=base.dtype,
            max_model_len=base.max_model_len,
            max_num_seqs=base.max_num_seqs,
            max_lora_rank=base.max_lora_rank,
            max_loras=base.max_loras,
            max_resident=base.max_resident,
            kv_cache_gib=base.kv_cache_gib,
            gpu_memory_utilization=base.gpu_memory_utilization,
            tool_call_parser=base.tool_call_parser,
            reasoning_parser=base.reasoning_parser,
            stored_responses=settings.stored_responses,
            truncates=settings.truncation == "auto",
            control_tokens=settings.control_tokens,
            max_logprobs=settings.max_logprobs,
            return_tokens_as_token_ids=settings.return_tokens_as_token_ids,
            always_usage=settings.always_usage,
        )
        return VllmEngine.build(options)

    engine = await in_daemon_thread(build)
    await engine.start()
    return engine


def _error_response(request: Request, error: Exception) -> JSONResponse:
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    is_anthropics = path.startswith(Endpoint.MESSAGES)
    body = errors.anthropic_body if is_anthropics else errors.body
    headers = {**errors.headers(error), **request_id_headers(request)}
    return JSONResponse(body(error), errors.row(error).status, headers)


def _validation_response(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's list of problems as one OpenAI error; the offending values are not repeated."""
    problems = cast(RequestValidationError, error).errors()
    first = problems[0]
    param = _param(first)
    missing = first["type"] == "missing"
    code = (
        "invalid_json"
        if first["type"] == "json_invalid"
        else "missing_required_parameter"
        if missing
        else None
    )
    told = [
        f"{where}: {in_words(problem)}" if (where := _param(problem)) else in_words(problem)
        for problem in problems[:_MOST_PROBLEMS]
    ]
    message = "; ".join(told)
    return _error_response(request, errors.BadRequest(message, code=code or "invalid_value", param=param))


def _param(problem: Mapping[str, Any]) -> str | None:
    return ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path")) or None


def _http_response(request: Request, error: Exception) -> JSONResponse:
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
