"""Observers of an answer while the engine writes it."""

import time
from bisect import bisect_left
from collections.abc import Sequence

from app.engine.base import Observer
from app.metrics import SECONDS, Metrics


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    @classmethod
    def of(cls, observers: Sequence[Observer]) -> Observer:
        """Combine observers. A single one is returned as it is, which saves a call for every token."""
        return observers[0] if len(observers) == 1 else cls(observers)

    def read(self, prompt_tokens: int) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.read(prompt_tokens)

    def wrote(self, choice: int, text: str, tokens: int) -> None:
        """See Observer."""
        for observer in self._observers:
            observer.wrote(choice, text, tokens)


class Texts:
    """Collects the text of each choice of an answer."""

    def __init__(self) -> None:
        self._parts: dict[int, list[str]] = {}

    def read(self, prompt_tokens: int) -> None:
        """See Observer."""

    def wrote(self, choice: int, text: str, tokens: int) -> None:
        """See Observer."""
        self._parts.setdefault(choice, []).append(text)

    def whole(self) -> list[str]:
        """Return the texts so far, in the order of choices."""
        return ["".join(self._parts[choice]) for choice in sorted(self._parts)]


class Meter:
    """Measures one answer; `end` adds it to the metrics."""

    def __init__(self, metrics: Metrics, started: float) -> None:
        """`started`: when the request arrived, on time.perf_counter's clock."""
        self._metrics = metrics
        self._last = started
        self._tokens = 0
        self._prompt_tokens = 0
        self._first: float | None = None
        self._gaps = [0] * (len(SECONDS) + 1)
        self._gaps_seconds = 0.0

    def read(self, prompt_tokens: int) -> None:
        """See Observer."""
        self._prompt_tokens += prompt_tokens

    def wrote(self, choice: int, text: str, tokens: int) -> None:
        """See Observer."""
        if not tokens:
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = now - self._last
        else:
            gap = now - self._last
            self._gaps[bisect_left(SECONDS, gap)] += 1
            self._gaps_seconds += gap
        self._last = now
        self._tokens += tokens

    def end(self, who: tuple[str, str], status: int, *, is_stream: bool) -> None:
        """Add the measurements to the metrics of `who`, an adapter and its revision.

        Latencies of tokens are recorded for streams only: in other answers all tokens arrive at once.
        """
        metrics = self._metrics
        metrics.requests.labels(*who, status).inc()
        metrics.prompt_tokens.labels(*who).inc(self._prompt_tokens)
        metrics.completion_tokens.labels(*who).inc(self._tokens)
        if is_stream and self._first is not None:
            metrics.time_to_first_token.labels(*who).observe(self._first)
            metrics.inter_token_latency.add(who, self._gaps, self._gaps_seconds)
