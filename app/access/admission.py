"""How many requests may be answered at once; the rest are told when to come back."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from app.errors import TooManyRequests


class Admission:
    """Counts requests from before they are read until their last byte."""

    def __init__(self, limit: int, gauge: Gauge) -> None:
        self._limit = limit
        self._gauge = gauge
        self._held = 0

    @property
    def in_flight(self) -> int:
        """Requests that hold a place."""
        return self._held

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place. Raises TooManyRequests when all are taken."""
        if self._held >= self._limit:
            raise TooManyRequests(f"{self._limit} requests are being answered already; try again in a moment")
        self._held += 1
        self._gauge.set(self._held)
        try:
            yield
        finally:
            self._held -= 1
            self._gauge.set(self._held)
