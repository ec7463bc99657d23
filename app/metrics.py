"""Prometheus metrics of the service. vLLM's own are off: a second engine would unregister the first's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WHO = ["adapter", "revision"]


class Metrics:
    """One registry for each app, so that two apps in one process do not clash.

    `adapter` is the base model's name for requests that no adapter answered, with the revision `base`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Chat requests by what answered and status", *_WHO, "status"
        )
        self.in_flight = self._gauge("requests_in_flight", "Chat requests being answered")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens read", *_WHO)
        self.completion_tokens = self._counter("completion_tokens", "Tokens written", *_WHO)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to the first token of its answer", *_WHO
        )
        self.inter_token_latency = Gaps(
            "xinglin_inter_token_latency_seconds", "From one token of a streamed answer to the next"
        )
        self.registry.register(self.inter_token_latency)
        self.loads = self._counter("adapter_loads", "Revisions loaded into the engine", *_WHO)
        self.evictions = self._counter("adapter_evictions", "Revisions removed to make room", *_WHO)
        self.load_seconds = self._histogram(
            "adapter_load_seconds",
            "Until the engine has the weights (load); until it proved itself (ready)",
            "to",
        )
        self.proofs = self._counter(
            "adapter_proofs", "Proofs by result: passed or failed", "adapter", "result"
        )
        self.refusals = self._counter(
            "adapter_refusals", "Adapters refused, by error code", "adapter", "reason"
        )
        self.shadow_answers = self._counter(
            "shadow_answers",
            "Copies of requests for a shadow: same, different, failed, or dropped so as to delay nobody",
            "adapter",
            "outcome",
        )
        self.engine_starts = self._counter(
            "engine_starts", "Engines that became ready; more than one: one has died"
        )

    def forget(self, adapter: str, revision: str) -> None:
        """End the series of a revision that has left for good, or they would grow without end."""
        for metric in (
            self.prompt_tokens, self.completion_tokens, self.time_to_first_token, self.inter_token_latency,
            self.loads, self.evictions,
        ):  # fmt: skip
            metric.remove_by_labels({"adapter": adapter, "revision": revision})
        self.requests.remove_by_labels({"adapter": adapter, "revision": revision})

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"xinglin_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"xinglin_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"xinglin_{name}", text, labels, registry=self.registry, buckets=SECONDS)


class Gaps(Collector):
    """A histogram that takes a whole answer at once: to observe each token costs as much as to send it."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._sums: dict[tuple[str, str], float] = {}

    def add(self, who: tuple[str, str], counts: Sequence[int], total: float) -> None:
        """Add an answer's gaps: how many lie in each bucket, and how long they are together, in seconds."""
        before = self._counts.get(who, [0] * len(counts))
        self._counts[who] = [one + other for one, other in zip(before, counts, strict=True)]
        self._sums[who] = self._sums.get(who, 0.0) + total

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Forget one adapter's revision."""
        who = (labels["adapter"], labels["revision"])
        self._counts.pop(who, None)
        self._sums.pop(who, None)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for."""
        family = HistogramMetricFamily(self._name, self._text, labels=_WHO)
        bounds = [*map(floatToGoString, (*SECONDS, math.inf))]
        for who, counts in [*self._counts.items()]:
            family.add_metric(who, [*zip(bounds, accumulate(counts), strict=True)], self._sums[who])
        yield family
