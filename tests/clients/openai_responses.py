"""OpenAI's client: responses. For versions since 2; version 1.55 has none."""

import json
from typing import Any

import openai
import pytest

from app import errors
from tests.clients.front import front_of
from tests.clients.openai_chat import Visit, client, refused
from tests.clients.served import DAYS, ENDLESS, MODEL, QUESTION, TOO_LONG, VISIT, aborted, without_blanks

TOOL: dict[str, Any] = {
    "type": "function", "name": "book", "description": "Book a visit.", "parameters": VISIT, "strict": True,
}  # fmt: skip


def ask(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 100, **options}


def ask_for_json(url: str, **options: Any) -> dict[str, Any]:
    return ask(max_output_tokens=200, extra_body={"logit_bias": without_blanks(url)}, **options)


def check_a_response(url: str) -> None:
    reply = client(url).responses.create(**ask())
    assert (reply.object, reply.model, reply.status) == ("response", MODEL, "completed")
    assert reply.output_text
    assert reply.usage
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply._request_id


def check_an_incomplete_response(url: str) -> None:
    reply = client(url).responses.create(**ask(max_output_tokens=3))
    assert reply.status == "incomplete"
    assert reply.incomplete_details
    assert reply.incomplete_details.reason == "max_output_tokens"


def check_a_stream(url: str) -> None:
    whole = client(url).responses.create(**ask())
    events: list[Any] = list(client(url).responses.create(**ask(stream=True)))
    types = [event.type for event in events]
    assert types[:2] == ["response.created", "response.in_progress"]
    assert types[-1] == "response.completed"
    assert [event.sequence_number for event in events] == [*range(len(events))]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens if whole.usage else False


def check_the_helper_for_streams(url: str) -> None:
    with client(url).responses.stream(**ask()) as stream:
        assert "response.output_text.done" in [event.type for event in stream]
        assert stream.get_final_response().output_text


def check_a_required_tool(url: str) -> None:
    for choice in ("required", {"type": "function", "name": "book"}):
        reply = client(url).responses.create(**ask_for_json(url, tools=[TOOL], tool_choice=choice))
        (call,) = [item for item in reply.output if item.type == "function_call"]
        assert call.name == "book"
        assert call.call_id
        assert json.loads(call.arguments)["day"] in DAYS


def check_a_tool_that_need_not_be_called(url: str) -> None:
    assert client(url).responses.create(**ask(tools=[TOOL])).output_text


def check_the_result_of_a_tool(url: str) -> None:
    turns = [
        {"role": "user", "content": QUESTION},
        {"type": "function_call", "call_id": "call_1", "name": "book", "arguments": '{"day": "Friday"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "booked"},
    ]
    assert client(url).responses.create(**ask(input=turns, tools=[TOOL])).output


def check_structured_output(url: str) -> None:
    wanted = {"format": {"type": "json_schema", "name": "visit", "schema": VISIT, "strict": True}}
    reply = client(url).responses.create(**ask_for_json(url, text=wanted))
    assert json.loads(reply.output_text)["day"] in DAYS


def check_parse(url: str) -> None:
    reply = client(url).responses.parse(**ask_for_json(url, text_format=Visit))
    assert isinstance(reply.output_parsed, Visit)


def check_log_probabilities(url: str) -> None:
    wanted = ask(include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=3)
    reply: Any = client(url).responses.create(**wanted)
    tokens = reply.output[0].content[0].logprobs
    assert "".join(one.token for one in tokens) == reply.output_text
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in tokens)


def check_a_stored_response(url: str) -> None:
    one = client(url)
    reply = one.responses.create(**ask())
    assert one.responses.retrieve(reply.id) == reply
    follow_up = one.responses.create(
        **ask(input="why?", previous_response_id=reply.id, instructions="Be brief.")
    )
    assert follow_up.previous_response_id == reply.id
    assert follow_up.usage
    assert reply.usage
    assert follow_up.usage.input_tokens > reply.usage.input_tokens
    one.responses.delete(reply.id)
    error = refused(openai.NotFoundError, one.responses.retrieve, response_id=reply.id)
    assert (error.code, error.param) == ("response_not_found", "response_id")


def check_a_response_that_is_not_stored(url: str) -> None:
    reply = client(url).responses.create(**ask(store=False))
    refused(openai.NotFoundError, client(url).responses.retrieve, response_id=reply.id)


def check_a_response_in_the_background_is_cancelled(url: str) -> None:
    one = client(url)
    reply = one.responses.create(**ask(background=True, max_output_tokens=900, extra_body=ENDLESS))
    assert reply.status in ("queued", "in_progress")
    assert one.responses.cancel(reply.id).status == "cancelled"
    assert one.responses.retrieve(reply.id).status == "cancelled"
    assert refused(openai.BadRequestError, one.responses.cancel, response_id=reply.id).code == "invalid_value"
    one.responses.delete(reply.id)


def check_a_stream_in_the_background_is_followed(url: str) -> None:
    one = client(url)
    first: Any = next(iter(one.responses.create(**ask(background=True, stream=True))))
    events: list[Any] = list(one.responses.retrieve(first.response.id, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    later = list(one.responses.retrieve(first.response.id, stream=True, starting_after=2))
    assert [event.sequence_number for event in later] == [event.sequence_number for event in events][3:]


def check_errors(url: str) -> None:
    for stream in (False, True):
        create = client(url).responses.create
        error = refused(openai.NotFoundError, create, **ask(model="nobody", stream=stream))
        assert (error.code, error.param) == ("model_not_found", "model")
        error = refused(openai.BadRequestError, create, **ask(input=TOO_LONG, stream=stream))
        assert error.code == "context_length_exceeded"
        error = refused(openai.BadRequestError, create, **ask(temperature=-1, stream=stream))
        assert (error.code, error.param) == ("invalid_value", "temperature")


def check_a_timeout_aborts_the_request(url: str) -> None:
    with aborted(url), pytest.raises(openai.APITimeoutError):
        client(url, timeout=0.3).responses.create(**ask(max_output_tokens=900, extra_body=ENDLESS))


def check_an_error_in_a_stream_is_raised(url: str) -> None:
    body = errors.body(errors.EngineUnavailable("the engine stopped"))
    event = json.dumps({**body["error"], **body, "type": "error", "sequence_number": 2})

    def change(stream: bytes) -> bytes:
        first, second, rest = stream.split(b"\n\n", 2)
        return b"\n\n".join((first, second, f"event: error\ndata: {event}".encode(), rest))

    with front_of(url, change=change) as front, pytest.raises(openai.APIError) as caught:
        list(client(front.url).responses.create(**ask(stream=True)))
    assert (caught.value.type, caught.value.code) == ("server_error", "engine_unavailable")
    assert caught.value.message == "the engine stopped"
