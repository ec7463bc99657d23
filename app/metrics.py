"""Prometheus metrics of the service. vLLM's own are off, since a second engine would unregister the first's."""

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
    """The metrics of one app, in a registry of its own so that two apps in one process do not clash.

    For a base model, `adapter` is its name and `revision` is `base`. Both are `unknown` for a request that failed
    before a model was chosen.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by adapter, revision and status", *_WHO, "status")
        self.in_flight = self._gauge("requests_in_flight", "Requests in flight")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed", *_WHO)
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated", *_WHO)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "Seconds from the request to the first token of its streamed answer",
            *_WHO,
        )
        self.inter_token_latency = Gaps(
            "xinglin_inter_token_latency_seconds", "Seconds between tokens of a streamed answer"
        )
        self.registry.register(self.inter_token_latency)
        self.loads = self._counter("adapter_loads", "Revisions loaded into the engine", *_WHO)
        self.evictions = self._counter("adapter_evictions", "Revisions evicted to make room", *_WHO)
        self.load_seconds = self._histogram(
            "adapter_load_seconds",
            "Seconds until the engine has the weights (load), and until the revision is proved (ready)",
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
            "Requests copied to a shadow, by outcome: same, different, failed, or dropped to delay no request",
            "adapter",
            "outcome",
        )
        self.engine_starts = self._counter("engine_starts", "Engines that became ready, restarts included")

    def forget(self, adapter: str, revision: str) -> None:
        """Remove the series of a revision that has left for good, so that the number of series stays bounded."""
        for metric in (
            self.prompt_tokens, self.completion_tokens, self.time_to_first_token, self.inter_token_latency,
            self.loads, self.evictions,
        ):  # fmt: skip
            metric.remove_by_labels({"adapter": adapter, "revision": revision})
        self.requests.remove_by_labels({"adapter": adapter, "revision": revision})

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"xinglin_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"xinglin_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"xinglin_{name}", text, labels, registry=self.registry, buckets=SECONDS)


class Gaps(Collector):
    """A histogram updated once an answer, because observing each token costs as much as sending it."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._sums: dict[tuple[str, str], float] = {}

    def add(self, who: tuple[str, str], counts: Sequence[int], total: float) -> None:
        """Add an answer's gaps: their count in each bucket, and their total in seconds."""
        before = self._counts.get(who, [0] * len(counts))
        self._counts[who] = [one + other for one, other in zip(before, counts, strict=True)]
        self._sums[who] = self._sums.get(who, 0.0) + total

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Remove the series of one revision."""
        who = (labels["adapter"], labels["revision"])
        self._counts.pop(who, None)
        self._sums.pop(who, None)

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        family = HistogramMetricFamily(self._name, self._text, labels=_WHO)
        bounds = [*map(floatToGoString, (*SECONDS, math.inf))]
        for who, counts in [*self._counts.items()]:
            family.add_metric(who, [*zip(bounds, accumulate(counts), strict=True)], self._sums[who])
        yield family
