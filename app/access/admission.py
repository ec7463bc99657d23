"""The limit of concurrent requests; requests beyond it get 429 with Retry-After."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from app.errors import TooManyRequests


class Admission:
    """Counts requests in flight, from before their body is read until the last byte of the response."""

    def __init__(self, limit: int, gauge: Gauge) -> None:
        self._limit = limit
        self._gauge = gauge
        self._held = 0

    @property
    def in_flight(self) -> int:
        """The number of requests that hold a place."""
        return self._held

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place. Raises TooManyRequests when all are taken."""
        if self._held >= self._limit:
            raise TooManyRequests(
                f"{self._limit} requests are in flight, which is the limit: retry in a moment"
            )
        self._held += 1
        self._gauge.set(self._held)
        try:
            yield
        finally:
            self._held -= 1
            self._gauge.set(self._held)
