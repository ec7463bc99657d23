"""OpenAI's client: models, chat and completions. For every major version since 1."""

import asyncio
import json
from functools import cache
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.front import front_of
from tests.clients.served import DAYS, MODEL, QUESTION, TOO_LONG, VISIT, without_blanks

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "book", "description": "Book a visit.", "parameters": VISIT, "strict": True},
}
BOOK = {"type": "function", "function": {"name": "book"}}


class Visit(BaseModel):
    """A visit."""

    day: Literal["Monday", "Friday"]


@cache  # each loads the certificates of the machine
def client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", **{"max_retries": 0, **options})


def ask(**options: Any) -> dict[str, Any]:
    question = {"role": "user", "content": QUESTION}
    return {"model": MODEL, "messages": [question], "temperature": 0, "max_tokens": 16, **options}


def ask_for_json(url: str, **options: Any) -> dict[str, Any]:
    return ask(max_tokens=200, logit_bias=without_blanks(url), **options)


def refused(kind: type[openai.APIStatusError], call: Any, **options: Any) -> openai.APIStatusError:
    """The error that `call` raises: of this class, with an error object in OpenAI's shape."""
    with pytest.raises(kind) as caught:
        call(**options)
    error = caught.value
    assert type(error).__module__.startswith("openai")
    assert isinstance(error.body, dict)
    assert {*error.body} == {"message", "type", "param", "code"}, error.body
    assert error.code == error.body["code"]
    assert isinstance(error.body["code"], str)
    assert str(error.body["message"]) in str(error)
    assert error.type == "invalid_request_error"
    return error


def check_models_are_listed(url: str) -> None:
    models = list(client(url).models.list())
    assert [model.id for model in models] == ["xinglin-demo", "doctor", "doctor-ppo", "leaflet"]
    assert all(model.object == "model" and model.created and model.owned_by for model in models)


def check_a_model_is_retrieved(url: str) -> None:
    assert client(url).models.retrieve("doctor@default").id == "doctor@default"


def check_model_ids_of_all_shapes_arrive(url: str) -> None:
    with front_of(url) as front:
        for name in ("org/lora", "ft:base:org:lora"):
            error = refused(openai.NotFoundError, client(front.url).models.retrieve, model=name)
            assert name in error.message
            assert (error.code, error.param) == ("model_not_found", "model")
    slash = "/" if openai.__version__ < "2.1" else "%2F"
    assert front.paths == [f"/v1/models/org{slash}lora", "/v1/models/ft:base:org:lora"]


def check_chat(url: str) -> None:
    reply = client(url).chat.completions.create(**ask(max_tokens=100))
    (choice,) = reply.choices
    assert (reply.object, reply.model, choice.finish_reason) == ("chat.completion", MODEL, "stop")
    assert (choice.message.role, choice.message.tool_calls) == ("assistant", None)
    assert choice.message.content
    assert reply.system_fingerprint
    assert reply.system_fingerprint.startswith("doctor@")
    assert reply.usage
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def check_a_stream(url: str) -> None:
    reply = client(url).chat.completions.create(**ask(max_tokens=100))
    chunks = list(client(url).chat.completions.create(**ask(max_tokens=100, stream=True)))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply.choices[0].message.content
    )
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices[0].delta.role] == ["assistant"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1


def check_a_stream_with_usage(url: str) -> None:
    reply = client(url).chat.completions.create(**ask())
    options = ask(stream=True, stream_options={"include_usage": True})
    *chunks, last = client(url).chat.completions.create(**options)
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    # But for the tokens read before: the second time, there are some.
    assert last.usage.total_tokens == reply.usage.total_tokens
    assert last.usage.completion_tokens == reply.usage.completion_tokens


def check_a_stream_ends_with_done(url: str) -> None:
    with client(url).chat.completions.with_streaming_response.create(
        **ask(max_tokens=100, stream=True)
    ) as response:
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"


def check_several_answers_in_one_stream(url: str) -> None:
    chunks = list(client(url).chat.completions.create(**ask(stream=True, n=2, temperature=1)))
    finished = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
    assert sorted(finished) == [0, 1]


def check_the_asynchronous_client(url: str) -> None:
    async def texts() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as one:
            reply = await one.chat.completions.create(**ask())
            stream = await one.chat.completions.create(**ask(stream=True))
            return reply.choices[0].message.content, "".join(
                [chunk.choices[0].delta.content or "" async for chunk in stream]
            )

    reply, streamed = asyncio.run(texts())
    assert reply
    assert reply == streamed


def _is_booked(choice: Any) -> None:
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "book")
    assert call.id
    assert json.loads(call.function.arguments)["day"] in DAYS


def check_a_required_tool(url: str) -> None:
    options = ask_for_json(url, tools=[TOOL], tool_choice="required")
    (choice,) = client(url).chat.completions.create(**options).choices
    _is_booked(choice)
    assert choice.finish_reason == "tool_calls"


def check_a_named_tool(url: str) -> None:
    options = ask_for_json(url, tools=[TOOL], tool_choice=BOOK)
    (choice,) = client(url).chat.completions.create(**options).choices
    _is_booked(choice)
    assert choice.finish_reason in ("tool_calls", "stop")


def check_a_named_tool_in_a_stream(url: str) -> None:
    options = ask_for_json(url, tools=[TOOL], tool_choice=BOOK, stream=True)
    calls = [
        call
        for chunk in client(url).chat.completions.create(**options)
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert {call.index for call in calls} == {0}
    assert len([call.id for call in calls if call.id]) == 1
    assert "".join(call.function.name or "" for call in calls) == "book"
    assert json.loads("".join(call.function.arguments or "" for call in calls))["day"] in DAYS


def check_a_tool_that_need_not_be_called(url: str) -> None:
    reply = client(url).chat.completions.create(**ask(tools=[TOOL], tool_choice="auto"))
    assert reply.choices[0].message.content
    assert not reply.choices[0].message.tool_calls


def check_the_result_of_a_tool(url: str) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "book", "arguments": '{"day": "Friday"}'},
    }
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "booked"},
    ]
    reply = client(url).chat.completions.create(**ask(messages=messages, tools=[TOOL]))
    assert reply.choices[0].finish_reason in ("stop", "length")


def check_structured_output(url: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "visit", "schema": VISIT, "strict": True}}
    reply = client(url).chat.completions.create(**ask_for_json(url, response_format=wanted))
    assert json.loads(reply.choices[0].message.content or "")["day"] in DAYS


def check_parse(url: str) -> None:
    one = client(url)
    completions: Any = (
        one.chat.completions if hasattr(one.chat.completions, "parse") else one.beta.chat.completions
    )
    reply = completions.parse(**ask_for_json(url, response_format=Visit))
    assert isinstance(reply.choices[0].message.parsed, Visit)


def check_parse_a_stream(url: str) -> None:
    one = client(url)
    completions: Any = (
        one.chat.completions if hasattr(one.chat.completions, "stream") else one.beta.chat.completions
    )
    with completions.stream(**ask_for_json(url, response_format=Visit)) as stream:
        assert "content.done" in [event.type for event in stream]
        reply = stream.get_final_completion()
    assert isinstance(reply.choices[0].message.parsed, Visit)


def check_log_probabilities(url: str) -> None:
    options = ask(logprobs=True, top_logprobs=2, max_tokens=3)
    whole = client(url).chat.completions.create(**options).choices[0]
    streamed = [chunk.choices[0] for chunk in client(url).chat.completions.create(**options, stream=True)]
    assert whole.logprobs
    assert whole.logprobs.content
    tokens = [one.token for choice in streamed if choice.logprobs for one in choice.logprobs.content or ()]
    assert tokens == [one.token for one in whole.logprobs.content]
    for one in whole.logprobs.content:
        assert len(one.top_logprobs) == 2
        assert one.logprob <= 0
        assert one.bytes
        assert bytes(one.bytes).decode() == one.token


def check_completions(url: str) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    reply = client(url).completions.create(prompt=["感冒", "gout"], logprobs=2, echo=True, **options)
    chinese, english = reply.choices
    assert reply.object == "text_completion"
    assert chinese.text.startswith("感冒")
    assert english.text.startswith("gout")
    assert chinese.logprobs
    assert chinese.logprobs.token_logprobs
    assert chinese.logprobs.token_logprobs[0] is None
    stream = client(url).completions.create(prompt="感冒", stream=True, **options)
    assert "感冒" + "".join(chunk.choices[0].text for chunk in stream) == chinese.text


def check_an_unknown_model(url: str) -> None:
    for stream in (False, True):
        create = client(url).chat.completions.create
        error = refused(openai.NotFoundError, create, **ask(model="nobody", stream=stream))
        assert (error.code, error.param) == ("model_not_found", "model")
        assert "doctor" in error.message


def check_a_bad_parameter(url: str) -> None:
    for change, param in (
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": "hello"}, "messages"),
    ):
        error = refused(openai.BadRequestError, client(url).chat.completions.create, **{**ask(), **change})
        assert (error.code, error.param) == ("invalid_value", param), error


def check_a_missing_parameter(url: str) -> None:
    error = refused(
        openai.BadRequestError,
        client(url).post,
        path="/chat/completions",
        body={"model": MODEL},
        cast_to=object,
    )
    assert (error.code, error.param) == ("missing_required_parameter", "messages")


def check_a_route_that_is_not_there(url: str) -> None:
    error = refused(openai.NotFoundError, client(url).embeddings.create, model=MODEL, input="x")
    assert error.code == "not_found"


def check_too_long_a_prompt(url: str) -> None:
    for stream in (False, True):
        long = ask(messages=[{"role": "user", "content": TOO_LONG}], stream=stream)
        error = refused(openai.BadRequestError, client(url).chat.completions.create, **long)
        assert error.code == "context_length_exceeded"
        assert "1024" in error.message


def check_the_id_of_a_request(url: str) -> None:
    reply = client(url).chat.completions.create(**ask(max_tokens=1))
    assert reply._request_id
    assert reply._request_id in reply.id


def check_the_id_of_a_refused_request(url: str) -> None:
    assert refused(
        openai.NotFoundError, client(url).chat.completions.create, **ask(model="nobody")
    ).request_id


def check_headers_of_an_account_are_taken(url: str) -> None:
    assert client(url, organization="org-1", project="proj-1").chat.completions.create(**ask(max_tokens=1)).id
