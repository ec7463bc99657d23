"""The state of one request: what its steps found, and the calls to make at its end."""

import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

from app.engine.base import Answer, Endpoint, Observer
from app.exchange.connection import own_id
from app.exchange.state import AppRequest
from app.lifecycle.bases import Base
from app.lifecycle.residency import Lease
from app.lifecycle.served_models import Choice


class Exchange:
    """One request. Each step reads what earlier steps found, and adds its own."""

    endpoint: Endpoint
    body: dict[str, Any]
    """Set by `read`."""
    choice: Choice
    base: Base
    """Set by `choose`."""
    leased: Lease
    """Set by `lease`."""
    answer: Answer
    """Set by `ask`."""

    def __init__(self, request: AppRequest, path: Endpoint | None) -> None:
        """`path`: the endpoint; None if the body decides."""
        self.request = request
        self.state = request.state
        self.path = path
        self.id = own_id(request)
        self.started = time.perf_counter()
        """On time.perf_counter's clock."""
        self.who = ("unknown", "unknown")
        """Adapter and revision as metric labels; never text from the client."""
        self.observers: list[Observer] = []
        """Observers of the answer while the engine writes it; add them before `ask`."""
        self.headers: dict[str, str] = {}
        """Headers of the response."""
        self.held = ExitStack()
        """Resources to release when nothing more is written."""
        self.steps = AsyncExitStack()
        """Contexts that last until the steps are done."""
        self.is_stream = False
        """Whether the answer is streamed."""
        self._ends: list[Callable[[int], None]] = []

    def at_end(self, call: Callable[[int], None]) -> None:
        """Register `call(status)` for the end of the request (499: the client disconnected)."""
        self._ends.append(call)

    def end(self, status: int) -> None:
        """Release all resources and make the calls registered with `at_end`."""
        with self.held:
            pass
        for call in self._ends:
            call(status)
