"""Check answers: which revision may answer at which time, and with which text."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from app.client.storm.client import Answer

Verdict = Literal["right", "failed", "wrong revision", "unlike any"]

BASE = "base"
"""The base model's key among the originals."""


@dataclass
class Timeline:
    """When each revision may answer for each name, as known to an operator outside the service.

    A revision may answer from the start of the call that points an alias at it to the end of the call that moves the
    alias away.
    """

    made_of: dict[str, str] = field(default_factory=dict)
    """Revision to original."""
    _spans: defaultdict[str, dict[str, list[list[float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """Model to revision to [begin, end]."""

    def begin(self, model: str, revision: str, at: float) -> None:
        """Allow `revision` to answer for `model` from `at` on."""
        spans = self._spans[model][revision]
        if spans and spans[-1][1] == float("inf"):
            return
        spans.append([at, float("inf")])

    def end(self, model: str, revision: str, at: float) -> None:
        """Forbid `revision` to answer requests for `model` sent after `at`."""
        spans = self._spans[model].get(revision)
        if spans:
            spans[-1][1] = min(spans[-1][1], at)

    def revisions(self, model: str, since: float, until: float) -> set[str]:
        """Return the revisions that may answer for `model` at any time in between."""
        return {
            revision
            for revision, spans in self._spans[model].items()
            if any(begin <= until and end >= since for begin, end in spans)
        }

    def could_answer(self, model: str, revision: str, since: float, until: float) -> bool:
        """Check whether `revision` is one of `revisions`."""
        spans = self._spans[model].get(revision, ())
        return any(begin <= until and end >= since for begin, end in spans)


@dataclass(frozen=True)
class Judge:
    """Compares answers with the references: the answers of each original without other load."""

    base_model: str
    references: Mapping[str, Sequence[str]]
    """The text for each question, by original or BASE."""
    timeline: Timeline

    def verdict(self, answer: Answer) -> Verdict:
        """Return the verdict on an answer. Call it when the timeline is complete."""
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
        """Return the originals whose text is right; none if the revision could not answer for this name at the time."""
        if answer.model == self.base_model:
            return {BASE} if answer.revision is None else set()
        asked = answer.model, answer.sent, answer.began
        if answer.revision is None:  # the server does not name the revision: accept any that may answer
            return {self.timeline.made_of[revision] for revision in self.timeline.revisions(*asked)}
        model, since, until = asked
        if not self.timeline.could_answer(model, answer.revision, since, until):
            return set()
        return {self.timeline.made_of[answer.revision]}
