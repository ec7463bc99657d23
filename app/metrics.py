"""Prometheus metrics of the service. vLLM's own are off: a second engine would unregister the first's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry for each app, so that two apps in one process do not clash."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "xinglin_requests",
            "Chat requests by served model and HTTP status",
            ["model", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "xinglin_requests_in_flight", "Chat requests being answered", registry=self.registry
        )
        self.time_to_first_event = Histogram(
            "xinglin_time_to_first_event_seconds",
            "From a streaming request to its first event",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.load_seconds = Histogram(
            "xinglin_adapter_load_seconds",
            "From a revision in the store to proven in the engine",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.refusals = Counter(
            "xinglin_adapter_refusals",
            "Adapters refused, by what refused them: validation, load or proof",
            ["by"],
            registry=self.registry,
        )
        self.engine_starts = Counter(
            "xinglin_engine_starts",
            "Engines that became ready; more than one: one has died",
            registry=self.registry,
        )

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)
