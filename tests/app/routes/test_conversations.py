"""Conversations that are longer than the context."""

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


def test_they_are_refused_unless_somebody_says_otherwise(service: Service) -> None:
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
    # The model was asked just what is left, which is as much as can be.
    _, plain = ask(service, model=model, messages=kept)
    assert plain["choices"][0]["message"] == reply["choices"][0]["message"]
    prompt = reply["usage"]["prompt_tokens"]
    assert prompt == plain["usage"]["prompt_tokens"] <= CONTEXT - 50 < prompt + 40
    _, whole = service.call("POST", "/tokenize", {"model": model, "messages": messages})
    assert whole["count"] == prompt + cut["tokens"]


def test_a_stream_says_it_in_its_headers(service: Service) -> None:
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


def test_anthropics_and_the_responses_api_are_cut_as_well(service: Service) -> None:
    turns = conversation(200)[1:]
    body = {"model": "doctor", "max_tokens": 20, "system": SYSTEM["content"], "messages": turns}
    status, reply = service.call("POST", "/v1/messages", {**body, "truncation": "auto"})
    assert status == 200, reply
    assert reply["usage"]["input_tokens"] <= CONTEXT - 20 < reply["usage"]["input_tokens"] + 40
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
