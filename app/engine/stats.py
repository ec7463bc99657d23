"""What one engine does and has done, counted as vLLM's server counts it, and once a step instead of once a token."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

# The buckets of vLLM 0.32's server (its vllm/v1/metrics/buckets.py), so that its dashboards and alerts fit.
_ANSWER_SECONDS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REQUEST_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Distribution:
    """How many values lay in each bucket, and what they come to together."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value` so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class EngineStats:
    """Of one engine since it started. Times in seconds."""

    def __init__(self, adapter_slots: int = 0) -> None:
        """`adapter_slots`: how many adapters one batch may mix."""
        self.adapter_slots = adapter_slots
        self.running = 0
        """Requests in the batch."""
        self.waiting = 0
        """Requests that the engine has no room for yet."""
        self.kv_cache_usage = 0.0
        """Share of the KV cache in use, from 0 to 1."""
        self.running_adapters: frozenset[str] = frozenset()
        self.waiting_adapters: frozenset[str] = frozenset()
        """Names of adapters with requests."""
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        """In tokens."""
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        """Answers by what ended them: stop, length, …"""
        self.first_token_seconds = Distribution(_FIRST_TOKEN_SECONDS)
        self.token_seconds = Distribution(_TOKEN_SECONDS)
        """From one token of an answer to the next."""
        self.answer_seconds = Distribution(_ANSWER_SECONDS)
        self.step_tokens = Distribution(_STEP_TOKENS)
        """Tokens that a step read and wrote."""
        self.request_prompt_tokens = Distribution(_REQUEST_TOKENS)
        self.request_generation_tokens = Distribution(_REQUEST_TOKENS)
