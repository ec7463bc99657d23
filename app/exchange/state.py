"""The typed state that the app's lifespan gives to every request."""

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fastapi import Request

from adapters import AdapterStore
from app.access.admission import Admission
from app.access.keys import Access
from app.exchange.shadow import Shadow
from app.fetch.imports import Imports
from app.lifecycle.bases import Bases
from app.lifecycle.operations import Operations
from app.lifecycle.reconciler import Reconciler
from app.lifecycle.served_models import ServedModels
from app.metrics import Metrics


class State(TypedDict):
    """The contents of `request.state`, composed by app.main."""

    access: Access
    admission: Admission
    bases: Bases
    imports: Imports
    metrics: Metrics
    operations: Operations
    publish_roots: tuple[Path, ...]
    reconciler: Reconciler
    served_models: ServedModels
    shadow: Shadow
    sources: tuple[str, ...]
    started_at: int
    store: AdapterStore


if TYPE_CHECKING:
    AppRequest = Request[State]
else:
    AppRequest = Request  # FastAPI would read a parameter of the generic class as a body
