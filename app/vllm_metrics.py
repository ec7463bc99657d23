"""Metrics under the names of vLLM's server, which dashboards, autoscalers and routers read.

As in vLLM, they count per base model, not per adapter. The engines count; this module reads on each scrape.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app.engine.stats import Distribution, EngineStats
from app.lifecycle.bases import Bases

_BY_MODEL = ["model_name", "engine"]
_REASONS = ("stop", "length", "abort", "error", "repetition")  # reported from the start, even at 0

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Requests in the batch", lambda stats: stats.running),
    "num_requests_waiting": ("Requests waiting for room in the batch", lambda stats: stats.waiting),
    "kv_cache_usage_perc": ("KV cache in use; 1 is all of it", lambda stats: stats.kv_cache_usage),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], int]]] = {
    "prompt_tokens": ("Prompt tokens processed", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens generated", lambda stats: stats.generation_tokens),
    "prefix_cache_queries": (
        "Tokens looked up in the prefix cache",
        lambda stats: stats.prefix_cache_queries,
    ),
    "prefix_cache_hits": ("Tokens found in the prefix cache", lambda stats: stats.prefix_cache_hits),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[EngineStats], Distribution]]] = {
    "time_to_first_token_seconds": (
        "Seconds from the request to the first token of its answer",
        lambda stats: stats.first_token_seconds,
    ),
    "inter_token_latency_seconds": (
        "Seconds between tokens of an answer",
        lambda stats: stats.token_seconds,
    ),
    "e2e_request_latency_seconds": (
        "Seconds from the request to the end of its answer",
        lambda stats: stats.answer_seconds,
    ),
    "iteration_tokens_total": (
        "Tokens processed and generated in one engine step",
        lambda stats: stats.step_tokens,
    ),
    "request_prompt_tokens": ("Tokens in a prompt", lambda stats: stats.request_prompt_tokens),
    "request_generation_tokens": ("Tokens in an answer", lambda stats: stats.request_generation_tokens),
}


class VllmMetrics(Collector):
    """Collects the metrics of all ready engines."""

    def __init__(self, bases: Bases) -> None:
        self._hosts = bases

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        engines = [
            (base.name, base.supervisor.engine.stats) for base in self._hosts if base.supervisor.is_ready
        ]
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_BY_MODEL)
            for model, stats in engines:
                gauge.add_metric([model, "0"], value(stats))
            yield gauge
        for name, (text, count) in _COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_BY_MODEL)
            for model, stats in engines:
                counter.add_metric([model, "0"], count(stats))
            yield counter
        for name, (text, distribution) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", text, labels=_BY_MODEL)
            for model, stats in engines:
                _add(histogram, [model, "0"], distribution(stats))
            yield histogram
        success = CounterMetricFamily(
            "vllm:request_success",
            "Finished requests by finish reason",
            labels=[*_BY_MODEL, "finished_reason"],
        )
        for model, stats in engines:
            for reason in _REASONS:
                success.add_metric([model, "0", reason], stats.finished[reason])
        yield success
        yield _adapters([stats for _, stats in engines])


def _adapters(engines: Sequence[EngineStats]) -> Metric:
    """Return one metric for all base models, because vLLM's has no label for the model."""
    running = {name for stats in engines for name in stats.running_adapters}
    waiting = {name for stats in engines for name in stats.waiting_adapters}
    slots = sum(stats.adapter_slots for stats in engines)
    labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
    gauge = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters with running and waiting requests; the value is the time of the scrape",
        labels=labels,
    )
    gauge.add_metric([str(slots), ",".join(sorted(waiting)), ",".join(sorted(running))], time.time())
    return gauge


def _add(family: HistogramMetricFamily, labels: list[str], found: Distribution) -> None:
    bounds = map(floatToGoString, (*found.bounds, math.inf))
    family.add_metric(labels, [*zip(bounds, accumulate(found.counts), strict=True)], found.total)
