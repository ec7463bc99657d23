"""The service answers as stock vLLM does, and the comparison that says so would see it if not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.alike.compare import ABSENT, Difference, differences, told
from tests.alike.deliberate import DELIBERATE, reason
from tests.alike.outcome import Outcome, of_stream
from tests.alike.requests import Request, make_requests
from tests.alike.servers import ask_both, stock_with_adapters
from tests.bench.serve.stock import wait_for_health
from tests.service import Service


@pytest.fixture
def stock(data_dir: Path) -> Iterator[Service]:
    server = stock_with_adapters(data_dir)
    server.start(until_ready=False)
    try:
        wait_for_health(server)
        yield server
    finally:
        server.stop()


def test_answers_are_those_of_stock_vllm(stock: Service, service: Service) -> None:
    """But for what is deliberate. `python -m tests.alike` asks more, and shows what differs."""
    found = [
        told(request, difference)
        for request, of_stock, of_ours in ask_both(make_requests(60, seed=11), stock, service)
        for difference in differences(of_stock, of_ours)
        if reason(request, difference) is None
    ]
    assert not found, "\n\n".join(found)


def test_requests_are_the_same_for_the_same_seed() -> None:
    def told(seed: int) -> str:
        return repr([(one.path, one.body) for one in make_requests(100, seed)])

    assert told(1) == told(1) != told(2)
    assert 0.5 < sum(one.is_right for one in make_requests(300, 1)) / 300 < 0.9
    assert len({one.path for one in make_requests(300, 1)}) == 7


REPLY: dict[str, Any] = {
    "id": "chatcmpl-0123456789abcdef",
    "created": 1,
    "choices": [{"index": 0, "message": {"content": "flu"}, "logprobs": [-0.5], "finish_reason": "stop"}],
    "usage": {"total_tokens": 3},
}


def _reply(**choice: Any) -> Outcome:
    return Outcome(200, {**REPLY, "choices": [{**REPLY["choices"][0], **choice}]})


@pytest.mark.parametrize(
    ("ours", "where"),
    [
        (_reply(message={"content": "flu."}), ["choices[].message.content"]),
        (_reply(message={}), ["choices[].message.content"]),
        (_reply(message={"content": "flu", "refusal": None}), ["choices[].message.refusal"]),
        (_reply(finish_reason="length"), ["choices[].finish_reason"]),
        (_reply(finish_reason=None), ["choices[].finish_reason"]),
        (_reply(logprobs=[-0.5002]), ["choices[].logprobs[]"]),
        (_reply(logprobs=[-0.50001]), []),
        (_reply(logprobs=[-0.5, -1.0]), ["choices[].logprobs[]"]),
        (Outcome(200, {**REPLY, "usage": {"total_tokens": 4}}), ["usage.total_tokens"]),
        (Outcome(200, {**REPLY, "usage": {"total_tokens": 3.0}}), ["usage.total_tokens"]),
        (Outcome(200, {**REPLY, "created": 2, "id": "chatcmpl-fedcba9876543210"}), []),
        (Outcome(200, {**REPLY, "id": "cmpl-fedcba9876543210"}), ["id"]),
        (Outcome(200, {name: value for name, value in REPLY.items() if name != "created"}), ["created"]),
        (Outcome(400, {"error": {}}), ["status"]),
        (Outcome(500, {"error": {}}), ["status"]),
    ],
)
def test_a_difference_is_found(ours: Outcome, where: list[str]) -> None:
    assert [found.where for found in differences(Outcome(200, REPLY), ours)] == where


def test_refusals_differ_by_status_only() -> None:
    refused = Outcome(400, {"error": {"message": "no"}})
    assert differences(refused, Outcome(400, {"error": {"code": "never"}})) == []
    assert differences(refused, Outcome(404, refused.content)) == [
        Difference("status", refused, Outcome(404, refused.content))
    ]


def _chunk(
    content: str | None = None, *, role: str | None = None, finish: str | None = None
) -> dict[str, Any]:
    delta = {name: text for name, text in (("role", role), ("content", content)) if text is not None}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"total_tokens": 3}}
DONE = "[DONE]"
STREAM: list[Any] = [
    _chunk("", role="assistant"),
    _chunk("a "),
    _chunk("cold"),
    _chunk(".", finish="stop"),
    USAGE,
    DONE,
]


def _streamed(*events: Any) -> Outcome:
    data = (one if isinstance(one, str) else json.dumps(one) for one in events)
    return Outcome(200, of_stream("".join(f"data: {one}\n\n" for one in data)))


@pytest.mark.parametrize(
    "ours",
    [
        pytest.param(
            [STREAM[0], _chunk("a col"), _chunk("d.", finish="stop"), *STREAM[4:]], id="cut elsewhere"
        ),
        pytest.param([STREAM[0], _chunk("a cold.", finish="stop"), *STREAM[4:]], id="in one piece"),
    ],
)
def test_streams_may_be_cut_into_other_pieces(ours: list[Any]) -> None:
    assert differences(_streamed(*STREAM), _streamed(*ours)) == []


@pytest.mark.parametrize(
    "ours",
    [
        pytest.param([STREAM[0], STREAM[2], STREAM[1], *STREAM[3:]], id="another order"),
        pytest.param([*STREAM[:2], *STREAM[3:]], id="a piece is missing"),
        pytest.param(STREAM[1:], id="the role is missing"),
        pytest.param([STREAM[1], STREAM[0], *STREAM[2:]], id="the role is not first"),
        pytest.param(
            [*STREAM[:3], _chunk("", finish="stop"), _chunk("."), *STREAM[4:]], id="text after the end"
        ),
        pytest.param([*STREAM[:4], DONE], id="no usage"),
        pytest.param([*STREAM[:3], USAGE, STREAM[3], DONE], id="usage before the end"),
        pytest.param(
            [{**one, "usage": USAGE["usage"]} for one in STREAM[:5]] + [DONE], id="usage everywhere"
        ),
        pytest.param(STREAM[:5], id="no [DONE]"),
        pytest.param([*STREAM, DONE], id="two [DONE]"),
        pytest.param([*STREAM[:5], {"error": {"message": "no"}}, DONE], id="an error"),
    ],
)
def test_a_difference_of_streams_is_found(ours: list[Any]) -> None:
    assert differences(_streamed(*STREAM), _streamed(*ours))


def _typed(*events: dict[str, Any], skip: int = 0) -> Outcome:
    numbered = [{**one, "sequence_number": i + skip * (i > 0)} for i, one in enumerate(events)]
    return Outcome(
        200, of_stream("".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in numbered))
    )


def test_typed_events_are_compared() -> None:
    begun, ended = {"type": "begun"}, {"type": "ended", "text": "a cold"}
    pieces = [{"type": "piece", "delta": text} for text in ("a ", "cold")]
    stock = _typed(begun, *pieces, ended)
    assert differences(stock, _typed(begun, {"type": "piece", "delta": "a cold"}, ended)) == []
    for ours in (
        _typed(begun, *reversed(pieces), ended),
        _typed(begun, *pieces),
        _typed(*pieces, begun, ended),
        _typed(begun, *pieces, ended, skip=1),
    ):
        assert differences(stock, ours)


def test_what_is_deliberate_is_narrow() -> None:
    """Each entry says why, and none covers an answer with another text or a refusal of a plain request."""
    plain = Request("/v1/chat/completions", {"model": "doctor", "messages": []}, {}, is_right=True)
    answered, refused = Outcome(200, {}), Outcome(400, {})
    assert all(one.why for one in DELIBERATE)
    assert reason(plain, Difference("choices[].message.content", "a", "b")) is None
    assert reason(plain, Difference("id", "a", ABSENT)) is None
    assert reason(plain, Difference("status", answered, refused)) is None
    assert reason(plain, Difference("status", refused, answered)) is None
