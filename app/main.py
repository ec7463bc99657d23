"""The composition root: builds the FastAPI app from the settings. Nothing else reads settings."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from adapters import AdapterStore
from app.access.admission import Admission
from app.access.keys import Access, stored_admin_key
from app.engine.build import EngineOptions, build_engine
from app.engine.supervisor import Supervisor
from app.exchange.connection import RequestIds
from app.exchange.shadow import Shadow
from app.exchange.state import State
from app.fetch.imports import Imports
from app.lifecycle.bases import Base, Bases
from app.lifecycle.loader import Loader
from app.lifecycle.operations import Operations
from app.lifecycle.reconciler import Reconciler
from app.lifecycle.residency import Limits, Residency
from app.lifecycle.served_models import ServedModels
from app.lifecycle.transitions import Transitions
from app.metrics import Metrics
from app.routes import (
    adapters,
    answers,
    failures,
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


def create_app(
    settings: Settings,
    *,
    on_ready: Callable[[ServedModels], None] = lambda _: None,
    on_give_up: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Build the app. Its lifespan starts the engines in the background, so that health endpoints answer at once.

    Calls `on_ready` when no base model is starting any more and one is ready, `on_give_up` if none can start.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        metrics = Metrics()
        store = AdapterStore(settings.store_dir)
        served = ServedModels([str(base.served_model_name) for base in settings.bases()])
        bases = Bases([_base(settings, base, store, metrics, served) for base in settings.bases()])
        metrics.registry.register(VllmMetrics(bases))
        transitions = Transitions(store, served, bases)
        reconciler = Reconciler(store, served, bases, transitions, interval=settings.reconcile_seconds)
        shadow = Shadow(settings.data_dir / "shadow", bases, metrics, keep_texts=settings.shadow_texts)
        imports = _imports(settings)
        state = State(
            access=Access(_admin_key(settings), is_chat_open=settings.is_loopback),
            admission=Admission(settings.max_concurrent_requests, metrics.in_flight),
            bases=bases,
            imports=imports,
            metrics=metrics,
            operations=Operations(
                store, bases, transitions, metrics, allow_revisions=settings.allow_revisions
            ),
            publish_roots=tuple(root.resolve() for root in (settings.data_dir, *settings.publish_roots)),
            reconciler=reconciler,
            served_models=served,
            shadow=shadow,
            sources=settings.sources,
            started_at=int(time.time()),
            store=store,
        )
        running = bases.run(
            attach=reconciler.attach,
            detach=reconciler.detach,
            on_start=metrics.engine_starts.inc,
            on_settled=partial(on_ready, served),
            on_give_up=on_give_up,
        )
        tasks = [asyncio.create_task(task) for task in (running, reconciler.run(), shadow.run())]
        try:
            yield state
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            shadow.close()
            await imports.close()

    return _app(settings, lifespan)


def _app(settings: Settings, lifespan: Any) -> FastAPI:
    page = Route(
        "/openapi.json", openapi.openapi, include_in_schema=False
    )  # takes precedence over FastAPI's own
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
    failures.answer_for(app)
    return app


def _base(
    settings: Settings, base: BaseModelSettings, store: AdapterStore, metrics: Metrics, served: ServedModels
) -> Base:
    name = str(base.served_model_name)
    supervisor = Supervisor(
        name, partial(build_engine, _engine_options(settings, base)), stall_seconds=settings.stall_seconds
    )
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
        engine=lambda: supervisor.engine,
        answers=lambda ref: settings.allow_revisions or served.is_answering(ref),
        is_wanted=lambda ref: settings.allow_revisions or served.is_wanted(ref),
    )
    return Base(name, supervisor, residency)


def _engine_options(settings: Settings, base: BaseModelSettings) -> EngineOptions:
    return EngineOptions(
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


def _admin_key(settings: Settings) -> str:
    return (
        settings.admin_key.get_secret_value() if settings.admin_key else stored_admin_key(settings.data_dir)
    )


def _imports(settings: Settings) -> Imports:
    return Imports(
        settings.data_dir,
        allowed=settings.sources,
        private_networks=settings.private_networks,
        max_bytes=int(settings.max_adapter_gib * 2**30),
    )
