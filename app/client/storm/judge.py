"""What is right: which revision may answer when, and what it must say."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from app.client.storm.client import Answer

Verdict = Literal["right", "failed", "wrong revision", "unlike any"]

BASE = "base"
"""What stands for the base model among the originals."""


@dataclass
class Timeline:
    """When each revision might answer to each name, as an operator outside the service can know it.

    A revision may answer from when its alias began to move to it, until the alias has moved away.
    """

    made_of: dict[str, str] = field(default_factory=dict)
    """Revision to its original."""
    _spans: defaultdict[str, dict[str, list[list[float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """Model to revision to [begin, end]."""

    def begin(self, model: str, revision: str, at: float) -> None:
        """From `at` on `revision` may answer to `model`."""
        spans = self._spans[model][revision]
        if spans and spans[-1][1] == float("inf"):
            return
        spans.append([at, float("inf")])

    def end(self, model: str, revision: str, at: float) -> None:
        """Whoever asks `model` after `at` is answered by something else."""
        spans = self._spans[model].get(revision)
        if spans:
            spans[-1][1] = min(spans[-1][1], at)

    def revisions(self, model: str, since: float, until: float) -> set[str]:
        """Which revisions might answer to `model` at some time in between."""
        return {
            revision
            for revision, spans in self._spans[model].items()
            if any(begin <= until and end >= since for begin, end in spans)
        }

    def could_answer(self, model: str, revision: str, since: float, until: float) -> bool:
        """Whether `revision` is one of `revisions`."""
        spans = self._spans[model].get(revision, ())
        return any(begin <= until and end >= since for begin, end in spans)


@dataclass(frozen=True)
class Judge:
    """Compares answers with what each original says when nobody else asks anything."""

    base_model: str
    references: Mapping[str, Sequence[str]]
    """By original, or BASE: the text for each question."""
    timeline: Timeline

    def verdict(self, answer: Answer) -> Verdict:
        """What is to be said of an answer, after everything that moved has been told to the timeline."""
        if answer.failure is not None:
            return "failed"
        said = self._originals(answer)
        if not said:
            return "wrong revision"
        if any(self.references[original][answer.question] == answer.text for original in said):
            return "right"
        if any(texts[answer.question] == answer.text for texts in self.references.values()):
            return "wrong revision"
        return "unlike any"

    def _originals(self, answer: Answer) -> set[str]:
        """Whose text it must be; none if a revision answered that no longer, or not yet, answers to that name."""
        if answer.model == self.base_model:
            return {BASE} if answer.revision is None else set()
        asked = answer.model, answer.sent, answer.began
        if answer.revision is None:  # a server that does not say who answers: any that might have
            return {self.timeline.made_of[revision] for revision in self.timeline.revisions(*asked)}
        model, since, until = asked
        if not self.timeline.could_answer(model, answer.revision, since, until):
            return set()
        return {self.timeline.made_of[answer.revision]}
