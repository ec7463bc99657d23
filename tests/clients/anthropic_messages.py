"""Anthropic's client: messages and the count of their tokens."""

import asyncio
import json
from functools import cache
from typing import Any

import anthropic
import pytest

from app import errors
from tests.clients.front import front_of
from tests.clients.served import DAYS, MODEL, QUESTION, TOO_LONG, VISIT, aborted, all_places_taken

TOOL: dict[str, Any] = {"name": "book", "description": "Book a visit.", "input_schema": VISIT, "strict": True}
COLD = {"temperature": 0}
HOT = {"temperature": 2}
"""For JSON: the demo's models know none, and would fill it with blanks up to the limit if they were not led astray."""


@cache
def client(url: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="unused", **{"max_retries": 0, **options})


def ask(**options: Any) -> dict[str, Any]:
    question = {"role": "user", "content": QUESTION}
    return {"model": MODEL, "messages": [question], "max_tokens": 16, "extra_body": COLD, **options}


def refused(kind: type[anthropic.APIStatusError], call: Any, **options: Any) -> anthropic.APIStatusError:
    with pytest.raises(kind) as caught:
        call(**options)
    assert caught.value.api_message
    assert caught.value.api_message in str(caught.value)
    return caught.value


def check_a_message(url: str) -> None:
    reply = client(url).messages.create(**ask(max_tokens=100))
    (block,) = reply.content
    assert (reply.type, reply.role, reply.model, reply.stop_reason) == (
        "message",
        "assistant",
        MODEL,
        "end_turn",
    )
    assert block.type == "text"
    assert block.text
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens > 0


def check_the_limit_of_tokens(url: str) -> None:
    reply = client(url).messages.create(**ask(max_tokens=3))
    assert (reply.stop_reason, reply.usage.output_tokens) == ("max_tokens", 3)


def check_a_system_prompt_and_stop_sequences(url: str) -> None:
    blocks = [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]
    reply = client(url).messages.create(
        **ask(
            max_tokens=100,
            messages=[{"role": "user", "content": blocks}],
            system="You are a careful doctor.",
            stop_sequences=["。", "，", "："],
            metadata={"user_id": "somebody"},
        )
    )
    assert reply.stop_reason == "stop_sequence"
    assert reply.stop_sequence in ("。", "，", "：")


def check_a_stream(url: str) -> None:
    whole: Any = client(url).messages.create(**ask(max_tokens=100))
    events: list[Any] = list(client(url).messages.create(**ask(max_tokens=100, stream=True)))
    types = [event.type for event in events]
    assert types[:2] == ["message_start", "content_block_start"]
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert {*types[2:-3]} == {"content_block_delta"}
    assert "".join(event.delta.text for event in events[2:-3]) == whole.content[0].text
    assert events[0].message.usage.input_tokens == whole.usage.input_tokens
    assert events[-2].delta.stop_reason == "end_turn"
    assert events[-2].usage.output_tokens == whole.usage.output_tokens


def check_the_helper_for_streams(url: str) -> None:
    with client(url).messages.stream(**ask(max_tokens=100)) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert message.content[0].type == "text"
    assert message.content[0].text == text
    assert message.usage.output_tokens > 0


def check_the_asynchronous_client(url: str) -> None:
    async def text() -> Any:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="unused") as one:
            return (await one.messages.create(**ask())).content[0]

    assert asyncio.run(text()).text


def ask_for_tool(choice: dict[str, str], **tool: Any) -> dict[str, Any]:
    return ask(tools=[{**TOOL, **tool}], tool_choice=choice, max_tokens=900, extra_body=HOT)


def _input(reply: anthropic.types.Message) -> dict[str, object]:
    (call,) = [block for block in reply.content if block.type == "tool_use"]
    assert (call.name, reply.stop_reason) == ("book", "tool_use")
    assert call.id
    assert isinstance(call.input, dict), call.input
    return call.input


def check_a_required_tool(url: str) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "book"}):
        assert _input(client(url).messages.create(**ask_for_tool(choice)))["day"] in DAYS


def check_a_required_tool_in_a_stream(url: str) -> None:
    with client(url).messages.stream(**ask_for_tool({"type": "tool", "name": "book"})) as stream:
        assert _input(stream.get_final_message())["day"] in DAYS


def check_a_tool_that_need_not_be_called(url: str) -> None:
    assert client(url).messages.create(**ask(max_tokens=100, tools=[TOOL])).stop_reason == "end_turn"


def check_the_result_of_a_tool(url: str) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "book", "input": {"day": "Friday"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "booked"}
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert client(url).messages.create(**ask(messages=turns, tools=[TOOL])).content


def check_structured_output(url: str) -> None:
    wanted = {"format": {"type": "json_schema", "schema": {"enum": [*DAYS]}}}
    reply: Any = client(url).messages.create(**ask(output_config=wanted))
    assert json.loads(reply.content[0].text) in DAYS


def check_the_count_of_tokens(url: str) -> None:
    reply = client(url).messages.create(**ask(max_tokens=1))
    asked = {"model": MODEL, "messages": ask()["messages"]}
    assert client(url).messages.count_tokens(**asked).input_tokens == reply.usage.input_tokens


def check_errors(url: str) -> None:
    create = client(url).messages.create
    for stream in (False, True):
        error = refused(anthropic.NotFoundError, create, **ask(model="nobody", stream=stream))
        assert error.type == "not_found_error"
        assert "doctor" in str(error)
        error = refused(
            anthropic.BadRequestError, create, **ask(extra_body={"temperature": -1}, stream=stream)
        )
        assert error.type == "invalid_request_error"
        assert "temperature" in str(error)
        long = [{"role": "user", "content": TOO_LONG}]
        error = refused(anthropic.BadRequestError, create, **ask(messages=long, stream=stream))
        assert error.type == "invalid_request_error"
        assert "1024" in str(error)


def check_the_codes_of_errors(url: str) -> None:
    error = refused(anthropic.NotFoundError, client(url).messages.create, **ask(model="nobody"))
    assert error.error_code == "model_not_found"
    long = [{"role": "user", "content": TOO_LONG}]
    error = refused(anthropic.BadRequestError, client(url).messages.create, **ask(messages=long))
    assert error.error_code == "context_length_exceeded"


def check_the_id_of_a_request(url: str) -> None:
    assert client(url).messages.create(**ask(max_tokens=1))._request_id


def check_the_id_of_a_refused_request(url: str) -> None:
    assert refused(anthropic.NotFoundError, client(url).messages.create, **ask(model="nobody")).request_id


def check_an_unavailable_adapter_is_retried_when_told(url: str) -> None:
    with front_of(url, refusals=[errors.AdapterUnavailable("wait a second")]) as front:
        assert client(front.url, max_retries=1).messages.create(**ask(max_tokens=1)).id
    assert front.times[1] - front.times[0] >= 1


def check_too_many_requests_in_the_end_are_an_error(url: str) -> None:
    with all_places_taken(url):
        error = refused(anthropic.RateLimitError, client(url).messages.create, **ask())
    assert error.type == "rate_limit_error"


def check_what_cannot_be_mended_is_not_retried(url: str) -> None:
    with front_of(url) as front:
        refused(
            anthropic.NotFoundError, client(front.url, max_retries=2).messages.create, **ask(model="nobody")
        )
    assert len(front.paths) == 1


def check_a_timeout_aborts_the_request(url: str) -> None:
    with aborted(url), pytest.raises(anthropic.APITimeoutError):  # the answer takes half a second
        client(url, timeout=0.1).messages.create(**ask(max_tokens=100))


def check_an_error_in_a_stream_is_raised(url: str) -> None:
    event = json.dumps(errors.anthropic_body(errors.EngineUnavailable("the engine stopped")))

    def change(stream: bytes) -> bytes:
        first, second, rest = stream.split(b"\n\n", 2)
        return b"\n\n".join((first, second, f"event: error\ndata: {event}".encode(), rest))

    with front_of(url, change=change) as front, pytest.raises(anthropic.APIStatusError) as caught:
        list(client(front.url).messages.create(**ask(stream=True)))
    assert (caught.value.type, caught.value.api_message) == ("overloaded_error", "the engine stopped")
