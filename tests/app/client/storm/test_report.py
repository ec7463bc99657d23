"""The arithmetic of the report, and the judge's verdicts."""

import math
from itertools import pairwise

import pytest

from app.client.storm.client import Answer, _read_events
from app.client.storm.judge import BASE, Judge, Timeline
from app.client.storm.ledger import Ledger
from app.client.storm.report import counted, figures, from_buckets, hurt, spread, table

_METRICS = """\
xinglin_adapter_load_seconds_bucket{{le="0.01",to="load"}} {0}
xinglin_adapter_load_seconds_bucket{{le="0.1",to="load"}} {1}
xinglin_adapter_load_seconds_bucket{{le="+Inf",to="load"}} {2}
xinglin_adapter_load_seconds_bucket{{le="+Inf",to="ready"}} 7
xinglin_adapter_evictions_total{{adapter="a",revision="1"}} {0}
xinglin_adapter_evictions_total{{adapter="b",revision="2"}} 1.0
"""


def _judge() -> Judge:
    timeline = Timeline(made_of={"aaa": "doctor@1", "bbb": "leaflet@2"})
    timeline.begin("storm-0", "aaa", 0)
    timeline.begin("storm-0", "bbb", 10)
    timeline.end("storm-0", "aaa", 11)
    references = {BASE: ["base says"], "doctor@1": ["doctor says"], "leaflet@2": ["leaflet says"]}
    return Judge("tiny", references, timeline)


def _answer(
    model: str, revision: str | None, text: str, *, sent: float, failure: str | None = None
) -> Answer:
    return Answer(model, 0, sent, sent + 0.1, sent + 1, revision, text, failure)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (_answer("tiny", None, "base says", sent=1), "right"),
        (_answer("tiny", None, "doctor says", sent=1), "wrong revision"),
        (_answer("tiny", "aaa", "base says", sent=1), "wrong revision"),
        (_answer("storm-0", "aaa", "doctor says", sent=1), "right"),
        (_answer("storm-0", "aaa", "leaflet says", sent=1), "wrong revision"),
        (_answer("storm-0", "aaa", "nobody says", sent=1), "unlike any"),
        (_answer("storm-0", "bbb", "leaflet says", sent=1), "wrong revision"),  # too early
        (_answer("storm-0", "bbb", "leaflet says", sent=9.95), "right"),  # chosen while the alias moved
        (_answer("storm-0", "aaa", "doctor says", sent=10.5), "right"),
        (_answer("storm-0", "aaa", "doctor says", sent=11.5), "wrong revision"),  # too late
        (
            _answer("storm-0", None, "doctor says", sent=10.5),
            "right",
        ),  # a server that does not name the revision
        (_answer("storm-0", None, "doctor says", sent=11.5), "wrong revision"),
        (_answer("storm-0", "aaa", "", sent=1, failure="cut"), "failed"),
    ],
)
def test_verdicts(answer: Answer, verdict: str) -> None:
    assert _judge().verdict(answer) == verdict


def test_an_alias_may_return_to_a_revision() -> None:
    timeline = _judge().timeline
    timeline.begin("storm-0", "aaa", 20)
    timeline.end("storm-0", "bbb", 21)
    assert timeline.revisions("storm-0", 5, 6) == {"aaa"}
    assert timeline.revisions("storm-0", 15, 16) == {"bbb"}
    assert timeline.revisions("storm-0", 22, 30) == {"aaa"}


def test_spread() -> None:
    assert spread([]) == {"count": 0, "p50_ms": None, "p99_ms": None, "max_ms": None}
    found = spread(number / 1000 for number in range(101))
    assert found == {"count": 101, "p50_ms": 50.0, "p99_ms": 99.0, "max_ms": 100.0}


def test_percentiles_from_buckets() -> None:
    before, after = _METRICS.format(1, 1, 1), _METRICS.format(1, 11, 11)
    assert from_buckets(before, after, "load") == {"count": 10, "p50_ms": 55.0, "p99_ms": 99.1}
    assert from_buckets(before, after, "ready") == {"count": 0, "p50_ms": None, "p99_ms": None}
    beyond = from_buckets(before, _METRICS.format(1, 1, 11), "load")
    assert beyond["p50_ms"] == 100.0, "beyond the last edge, the edge is all that is known"


def test_counters() -> None:
    assert counted(_METRICS.format(1, 1, 1), _METRICS.format(5, 5, 5), "xinglin_adapter_evictions_total") == 4


def test_gaps_and_first_tokens_by_phase() -> None:
    ledger = Ledger(calm_began=10, storm_began=20, storm_ended=30)
    answer = _answer("tiny", None, "base says", sent=9)
    answer.tokens_at = [9.5, 10.5, 19.5, 20.5, 29.5, 30.5]
    ledger.add_stream(answer)
    late = _answer("tiny", None, "base says", sent=21)
    late.tokens_at = [21.25]
    ledger.add_stream(late)
    assert list(ledger.calm.gaps) == [1.0, 9.0]
    assert list(ledger.storm.gaps) == [1.0, 9.0]
    assert not ledger.calm.first_tokens
    assert list(ledger.storm.first_tokens) == [0.25]


def test_figures_and_table() -> None:
    ledger = Ledger(calm_began=0, storm_began=5, storm_ended=30, swaps=2)
    ledger.answers = [
        _answer("tiny", None, "base says", sent=1),
        _answer("storm-0", "aaa", "doctor says", sent=8),
        _answer("storm-0", "aaa", "leaflet says", sent=9),
        _answer("storm-0", "aaa", "", sent=9, failure="cut: no end"),
    ]
    found = figures(ledger, _judge(), ("", ""), [])
    assert found["answers"] == {
        "calm": {"requests": 1, "failed": 0, "wrong_revision": 0, "unlike_any": 0},
        "storm": {"requests": 3, "failed": 1, "wrong_revision": 1, "unlike_any": 0},
    }
    assert hurt(found) == ["1 answers by a wrong revision in the storm", "1 answers failed in the storm"]
    assert "1 times: cut: no end" in table(found)
    ledger.answers = ledger.answers[:2]
    assert hurt(figures(ledger, _judge(), ("", ""), [])) == []
    assert hurt(figures(ledger, _judge(), ("", ""), None)) == [
        "leaks could not be checked: the service did not list what its engine holds"
    ]


def test_streams_are_read_in_any_pieces() -> None:
    def event(content: str, finish: str = "null") -> bytes:
        choice = f'{{"delta": {{"content": "{content}"}}, "finish_reason": {finish}}}'
        return f'data: {{"choices": [{choice}]}}\n\n'.encode()

    whole = event("") + event("a") + event("b") + event("c", '"stop"') + b"data: [DONE]\n\n"
    cuts = [0, 10, len(event("") + event("a")), len(whole) - 20, len(whole)]
    answer = _answer("tiny", None, "", sent=0)
    _read_events(answer, [(float(at), whole[a:b]) for at, (a, b) in enumerate(pairwise(cuts))])
    assert (answer.text, answer.failure, answer.tokens_at) == ("abc", None, [1.0, 2.0, 3.0])

    for spoiled, told in (
        (whole.removesuffix(b"data: [DONE]\n\n"), "without [DONE]"),
        (whole.replace(b'"stop"', b"null"), "finish_reason None"),
        (event("a") + b'data: {"error": {}}\n\n', "error inside"),
    ):
        answer = _answer("tiny", None, "", sent=0)
        _read_events(answer, [(math.pi, spoiled)])
        assert told in (answer.failure or "")
