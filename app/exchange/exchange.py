"""One request on its way from body to last byte: what its steps found, and what has to happen when it is over."""

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
    """One request. Each step reads what those before it found, and adds its own."""

    endpoint: Endpoint
    body: dict[str, Any]
    """From `read` on."""
    choice: Choice
    base: Base
    """From `choose` on."""
    leased: Lease
    """From `lease` on."""
    answer: Answer
    """From `ask` on."""

    def __init__(self, request: AppRequest, path: Endpoint | None) -> None:
        """`path`: where it was sent; None if the body says what it is."""
        self.request = request
        self.state = request.state
        self.path = path
        self.id = own_id(request)
        self.started = time.perf_counter()
        """On time.perf_counter's clock."""
        self.who = ("unknown", "unknown")
        """Adapter and revision as metrics label them: never what a client made up."""
        self.observers: list[Observer] = []
        """Who follows the answer as the engine writes it: to be added before `ask`."""
        self.headers: dict[str, str] = {}
        """Of the reply."""
        self.held = ExitStack()
        """What is let go when nothing is written any more."""
        self.steps = AsyncExitStack()
        """What lasts until the steps are done."""
        self.is_stream = False
        """Whether the answer goes out as it is written."""
        self._ends: list[Callable[[int], None]] = []

    def at_end(self, call: Callable[[int], None]) -> None:
        """Have `call` called once, when all is over, with the status that came of it (499: the client left)."""
        self._ends.append(call)

    def end(self, status: int) -> None:
        """All is over."""
        with self.held:
            pass
        for call in self._ends:
            call(status)
