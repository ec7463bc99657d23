"""LangChain's ChatOpenAI."""

import asyncio
from typing import Any

import langchain_core.exceptions
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from app import errors
from tests.clients.front import front_of
from tests.clients.openai_chat import TOOL, Visit
from tests.clients.served import DAYS, ENDLESS, MODEL, QUESTION, TOO_LONG, aborted, without_blanks


def model(url: str, **options: Any) -> ChatOpenAI:
    given = {"model": MODEL, "temperature": 0, "max_tokens": 100, "max_retries": 0, **options}
    return ChatOpenAI(base_url=f"{url}/v1", api_key="unused", **given)


def check_chat(url: str) -> None:
    reply = model(url).invoke(QUESTION)
    assert reply.text
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.response_metadata["system_fingerprint"].startswith("doctor@")
    assert reply.usage_metadata["total_tokens"] > 0


def check_a_stream_with_usage(url: str) -> None:
    whole = model(url).invoke(QUESTION)
    chunks: list[AIMessageChunk] = list(model(url, stream_usage=True).stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata == whole.usage_metadata
    assert total.response_metadata["finish_reason"] == "stop"


def check_the_asynchronous_calls(url: str) -> None:
    async def texts() -> list[str]:
        return [reply.text for reply in await model(url).abatch([QUESTION] * 3)]

    assert len({*asyncio.run(texts())}) == 1


def check_tools(url: str) -> None:
    for choice in ("required", "book"):
        bound = model(url, logit_bias=without_blanks(url)).bind_tools([TOOL], tool_choice=choice)
        (call,) = bound.invoke(QUESTION).tool_calls
        assert call["name"] == "book"
        assert call["args"]["day"] in DAYS
        total: Any = None
        for chunk in bound.stream(QUESTION):
            total = chunk if total is None else total + chunk
        assert [(one["name"], one["args"]) for one in total.tool_calls] == [("book", call["args"])]


def check_a_tool_that_need_not_be_called(url: str) -> None:
    reply = model(url).bind_tools([TOOL]).invoke(QUESTION)
    assert reply.text
    assert reply.tool_calls == []


def check_the_result_of_a_tool(url: str) -> None:
    call = {"name": "book", "args": {"day": "Friday"}, "id": "call_1"}
    turns = [
        HumanMessage(QUESTION),
        AIMessage("", tool_calls=[call]),
        ToolMessage("booked", tool_call_id="call_1"),
    ]
    assert model(url).bind_tools([TOOL]).invoke(turns).response_metadata["finish_reason"] in (
        "stop",
        "length",
    )


def check_structured_output(url: str) -> None:
    for method in ("json_schema", "function_calling"):
        one = model(url, max_tokens=200, logit_bias=without_blanks(url))
        structured = one.with_structured_output(Visit, method=method, strict=True)
        assert isinstance(structured.invoke(QUESTION), Visit)


def check_log_probabilities(url: str) -> None:
    reply = model(url, logprobs=True, top_logprobs=2, max_tokens=3).invoke(QUESTION)
    tokens = reply.response_metadata["logprobs"]["content"]
    assert "".join(one["token"] for one in tokens) == reply.text


def check_responses(url: str) -> None:
    one = model(url, use_responses_api=True)
    reply = one.invoke(QUESTION)
    assert reply.text
    assert "".join(chunk.text for chunk in one.stream(QUESTION)) == reply.text


def check_errors(url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        model(url, model="nobody").invoke(QUESTION)
    assert isinstance(missing.value, langchain_core.exceptions.ModelNotFoundError)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        model(url, temperature=-1).invoke(QUESTION)
    assert (bad.value.code, bad.value.param) == ("invalid_value", "temperature")


def check_too_long_a_prompt(url: str) -> None:
    with pytest.raises(langchain_core.exceptions.ContextOverflowError) as caught:
        model(url).invoke(TOO_LONG)
    assert isinstance(caught.value, openai.BadRequestError)
    assert caught.value.code == "context_length_exceeded"


def check_an_unavailable_adapter_is_retried_when_told(url: str) -> None:
    with front_of(url, refusals=[errors.AdapterUnavailable("wait a second")]) as front:
        assert model(front.url, max_retries=1, max_tokens=1).invoke(QUESTION)
    assert front.times[1] - front.times[0] >= 1


def check_what_cannot_be_mended_is_not_retried(url: str) -> None:
    with front_of(url) as front, pytest.raises(openai.NotFoundError):
        model(front.url, model="nobody", max_retries=2).invoke(QUESTION)
    assert len(front.paths) == 1


def check_a_timeout_aborts_the_request(url: str) -> None:
    with aborted(url), pytest.raises(openai.APITimeoutError):
        model(url, timeout=0.3, max_tokens=900, extra_body=ENDLESS).invoke(QUESTION)
