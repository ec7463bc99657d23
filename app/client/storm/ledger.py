"""What is written down while a storm goes on."""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from app.client.storm.client import Answer


@dataclass
class Samples:
    """Seconds, as users of one phase saw them."""

    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    """Between two tokens of one answer."""
    first_tokens: "array[float]" = field(default_factory=lambda: array("d"))
    """From a request to its first token."""


@dataclass
class Ledger:
    """Everything that was seen. Times are on perf_counter's clock."""

    calm_began: float = 0.0
    storm_began: float = float("inf")
    storm_ended: float = float("inf")
    swaps: int = 0
    answers: list[Answer] = field(default_factory=list)
    calm: Samples = field(default_factory=Samples)
    storm: Samples = field(default_factory=Samples)
    seconds: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """What took how long, by what the report calls it."""
    actions: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    refusals: list[str] = field(default_factory=list)
    """Calls of the operator that failed and should not have."""
    changed_sides: int = 0
    """Sessions that a canary answered once and then not, or the other way round."""
    answered_unpointed: int = 0
    """Requests that were answered though nothing was pointed at."""
    lags: "array[float]" = field(default_factory=lambda: array("d"))
    """By how much the meter itself was late: gaps below this say nothing of the service."""
    notes: list[str] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        """Keep an answer for the judge."""
        self.answers.append(answer)

    def add_stream(self, answer: Answer) -> None:
        """Keep an answer of the load, and what its user saw of time."""
        self.add(answer)
        tokens_at = answer.tokens_at
        if tokens_at and (samples := self._samples(tokens_at[0])):
            samples.first_tokens.append(tokens_at[0] - answer.sent)
        for before, at in pairwise(tokens_at):
            if samples := self._samples(at):
                samples.gaps.append(at - before)
        answer.tokens_at = tokens_at[:1]  # millions of them otherwise

    def _samples(self, at: float) -> Samples | None:
        if self.calm_began <= at < self.storm_began:
            return self.calm
        return self.storm if self.storm_began <= at < self.storm_ended else None

    def in_phase(self, phase: str) -> Iterator[Answer]:
        """The answers that ended before the first swap (`calm`), or later (`storm`)."""
        return (one for one in self.answers if (one.ended < self.storm_began) == (phase == "calm"))
