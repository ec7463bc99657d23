"""Conversations longer than the context."""

from typing import Any

import pytest

from tests.service import Service

SYSTEM = {"role": "system", "content": "You are a doctor."}
CONTEXT = 1024


def conversation(turns: int) -> list[dict[str, str]]:
    said = [("user", "What are the symptoms of gout?"), ("assistant", "Sudden pain in the big toe.")] * turns
    return [
        SYSTEM,
        *({"role": role, "content": text} for role, text in said),
        {"role": "user", "content": "And?"},
    ]


def ask(service: Service, **body: Any) -> tuple[int, Any]:
    given = {"model": "doctor", "temperature": 0, "max_tokens": 50, **body}
    return service.call("POST", "/v1/chat/completions", given)


def test_long_conversations_are_refused_by_default(service: Service) -> None:
    for said in ({}, {"truncation": "disabled"}):
        status, reply = ask(service, messages=conversation(200), **said)
        assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    status, reply = ask(service, messages=conversation(2), truncation="middle")
    assert (status, reply["error"]["param"]) == (400, "truncation")


@pytest.mark.parametrize("model", ["doctor", "xinglin-demo"])
def test_two_hundred_turns_stay_within_context(service: Service, model: str) -> None:
    messages = conversation(200)
    status, reply = ask(service, model=model, messages=messages, truncation="auto")
    assert status == 200, reply
    cut = reply["truncated"]
    kept = [SYSTEM, *messages[1 + cut["messages"] :]]
    assert cut["messages"] % 2 == 0
    assert kept[1]["role"] == "user"
    # The model got exactly the remaining turns, which are as many as fit.
    _, plain = ask(service, model=model, messages=kept)
    assert plain["choices"][0]["message"] == reply["choices"][0]["message"]
    prompt = reply["usage"]["prompt_tokens"]
    assert prompt == plain["usage"]["prompt_tokens"] <= CONTEXT - 50 < prompt + 40
    _, whole = service.call("POST", "/tokenize", {"model": model, "messages": messages})
    assert whole["count"] == prompt + cut["tokens"]


def test_a_stream_reports_truncation_in_its_headers(service: Service) -> None:
    with service.client().chat.completions.with_streaming_response.create(
        model="doctor",
        messages=conversation(200),  # type: ignore[arg-type]
        max_tokens=5,
        stream=True,
        extra_body={"truncation": "auto"},
    ) as response:
        assert response.headers["x-truncated"].startswith("messages=")
    with service.client().chat.completions.with_streaming_response.create(
        model="doctor",
        messages=conversation(2),
        max_tokens=5,
        extra_body={"truncation": "auto"},  # type: ignore[arg-type]
    ) as response:
        assert "x-truncated" not in response.headers


def test_messages_and_responses_are_truncated_too(service: Service) -> None:
    turns = conversation(200)[1:]
    body = {"model": "doctor", "max_tokens": 20, "system": SYSTEM["content"], "messages": turns}
    status, reply = service.call("POST", "/v1/messages", {**body, "truncation": "auto"})
    assert status == 200, reply
    usage = reply["usage"]
    tokens_given = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
    assert tokens_given <= CONTEXT - 20 < tokens_given + 40
    assert reply["truncated"]["messages"] > 300
    assert service.call("POST", "/v1/messages", body)[1]["error"]["code"] == "context_length_exceeded"

    asked = {"model": "doctor", "max_output_tokens": 20, "instructions": SYSTEM["content"], "input": turns}
    status, reply = service.call("POST", "/v1/responses", {**asked, "truncation": "auto"})
    assert status == 200, reply
    assert reply["truncation"] == "auto"
    assert reply["usage"]["input_tokens"] <= CONTEXT - 20 < reply["usage"]["input_tokens"] + 40
    assert reply["truncated"]["messages"] > 300


def test_a_last_turn_that_does_not_fit_is_refused(service: Service) -> None:
    messages = [SYSTEM, {"role": "user", "content": "gout " * 2000}]
    status, reply = ask(service, messages=messages, truncation="auto")
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")


def tokens(service: Service, messages: list[dict[str, str]]) -> int:
    _, reply = service.call("POST", "/tokenize", {"model": "doctor", "messages": messages})
    return int(reply["count"])


def fitting(service: Service, room: int) -> list[dict[str, str]]:
    """Return as many turns as leave just that room."""
    turns = 1
    while tokens(service, conversation(turns + 1)) + room <= CONTEXT:
        turns += 1
    return conversation(turns)


@pytest.mark.parametrize("bound", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_does_not_reserve_room(service: Service, bound: str) -> None:
    """Turns stay if they leave room for an answer; max_tokens only bounds it, up to the remaining room."""
    messages = fitting(service, CONTEXT // 8)
    left = CONTEXT - tokens(service, messages)
    for most in (left, left + 1, CONTEXT - 1, 8 * CONTEXT):
        body = {"max_tokens": None, bound: most, "min_tokens": left, "ignore_eos": True}
        status, reply = ask(service, messages=messages, truncation="auto", **body)
        assert status == 200, reply
        assert "truncated" not in reply
        assert reply["usage"]["completion_tokens"] == left


def test_a_short_answer_needs_little_room(service: Service) -> None:
    messages = fitting(service, 10)
    assert tokens(service, messages) > CONTEXT - CONTEXT // 8
    assert "truncated" not in ask(service, messages=messages, truncation="auto", max_tokens=10)[1]
    assert ask(service, messages=messages, truncation="auto", max_tokens=500)[1]["truncated"]


def test_max_tokens_is_an_upper_bound_on_other_endpoints_too(service: Service) -> None:
    turns = fitting(service, CONTEXT // 8)[1:]
    body = {"model": "doctor", "temperature": 0, "truncation": "auto"}
    for path, asked in (
        ("/v1/messages", {"max_tokens": 8192, "messages": turns, "system": SYSTEM["content"]}),
        ("/v1/responses", {"max_output_tokens": 8192, "input": turns, "instructions": SYSTEM["content"]}),
    ):
        status, reply = service.call("POST", path, {**body, **asked})
        assert status == 200, reply
        assert "truncated" not in reply


def test_errors_that_truncation_cannot_fix_do_not_mention_it(service: Service) -> None:
    messages = [SYSTEM, {"role": "user", "content": "gout " * 2000}]
    _, reply = ask(service, messages=messages, truncation="auto")
    assert "the last turn and the system prompt are" in reply["error"]["message"]
    assert "truncation" not in reply["error"]["message"]
