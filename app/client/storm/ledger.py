"""The measurements of a storm."""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from app.client.storm.client import Answer


@dataclass
class Samples:
    """Times seen by the streams in one phase, in seconds."""

    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    """From one token of an answer to the next."""
    first_tokens: "array[float]" = field(default_factory=lambda: array("d"))
    """From request to first token."""


@dataclass
class Ledger:
    """All measurements. Times are those of perf_counter."""

    calm_began: float = 0.0
    storm_began: float = float("inf")
    storm_ended: float = float("inf")
    swaps: int = 0
    answers: list[Answer] = field(default_factory=list)
    calm: Samples = field(default_factory=Samples)
    storm: Samples = field(default_factory=Samples)
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Durations by their label in the report."""
    actions: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    refusals: list[str] = field(default_factory=list)
    """Admin calls that failed unexpectedly."""
    changed_sides: int = 0
    """Sessions that got both the canary and the default revision."""
    answered_unpointed: int = 0
    """Requests that were answered although their alias was removed."""
    lags: "array[float]" = field(default_factory=lambda: array("d"))
    """Lag of this client's event loop; token gaps of this size say nothing about the service."""
    notes: list[str] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """Record an answer for the judge."""
        self.answers.append(answer)

    def add_stream(self, answer: Answer) -> None:
        """Record an answer of a load stream and its token times."""
        self.add(answer)
        tokens_at = answer.tokens_at
        if tokens_at and (samples := self._samples(tokens_at[0])):
            samples.first_tokens.append(tokens_at[0] - answer.sent)
        for before, at in pairwise(tokens_at):
            if samples := self._samples(at):
                samples.gaps.append(at - before)
        answer.tokens_at = tokens_at[:1]  # there would be millions of them

    def _samples(self, at: float) -> Samples | None:
        if self.calm_began <= at < self.storm_began:
            return self.calm
        return self.storm if self.storm_began <= at < self.storm_ended else None

    def in_phase(self, phase: str) -> Iterator[Answer]:
        """Yield the answers that ended before the first swap (`calm`), or after it (`storm`)."""
        return (one for one in self.answers if (one.ended < self.storm_began) == (phase == "calm"))
