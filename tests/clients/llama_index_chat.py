"""LlamaIndex's OpenAILike."""

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from app import errors
from tests.clients.front import front_of
from tests.clients.openai_chat import Visit
from tests.clients.served import DAYS, ENDLESS, MODEL, QUESTION, TOO_LONG, VISIT, aborted, without_blanks

QUESTIONS = [ChatMessage(role="user", content=QUESTION)]


def book(day: Literal["Monday", "Friday"]) -> str:
    """Book a visit."""
    return day


TOOL = FunctionTool.from_defaults(book)


def model(url: str, **options: Any) -> OpenAILike:
    given = {"model": MODEL, "temperature": 0, "max_tokens": 100, "max_retries": 0, "context_window": 1024}
    chat = {"is_chat_model": True, "is_function_calling_model": True}
    return OpenAILike(api_base=f"{url}/v1", api_key="unused", **{**given, **chat, **options})


def model_for_json(url: str, **options: Any) -> OpenAILike:
    return model(url, additional_kwargs={"logit_bias": without_blanks(url)}, strict=True, **options)


def check_chat(url: str) -> None:
    reply = model(url).chat(QUESTIONS)
    assert reply.message.content
    assert reply.raw.choices[0].finish_reason == "stop"
    assert reply.raw.usage.total_tokens > 0


def check_a_stream_with_usage(url: str) -> None:
    whole = model(url).chat(QUESTIONS)
    options = {"stream_options": {"include_usage": True}}
    parts = list(model(url, additional_kwargs=options).stream_chat(QUESTIONS))
    assert "".join(part.delta or "" for part in parts) == whole.message.content
    assert parts[-1].raw.usage.total_tokens == whole.raw.usage.total_tokens


def check_the_asynchronous_calls(url: str) -> None:
    assert asyncio.run(model(url).achat(QUESTIONS)).message.content


def check_completions(url: str) -> None:
    one = model(url, is_chat_model=False, max_tokens=5)
    reply = one.complete("感冒")
    assert reply.text
    assert "".join(part.delta or "" for part in one.stream_complete("感冒")) == reply.text


def check_tools(url: str) -> None:
    one = model_for_json(url)
    for options in ({"tool_required": True}, {"tool_choice": "book"}):
        reply = one.chat_with_tools([TOOL], user_msg=QUESTION, **options)
        (call,) = one.get_tool_calls_from_response(reply)
        assert call.tool_name == "book"
        assert call.tool_kwargs["day"] in DAYS
    *_, last = one.stream_chat_with_tools([TOOL], user_msg=QUESTION, tool_required=True)
    (call,) = one.get_tool_calls_from_response(last)
    assert call.tool_kwargs["day"] in DAYS


def check_a_tool_that_need_not_be_called(url: str) -> None:
    reply = model(url).chat_with_tools([TOOL], user_msg=QUESTION)
    assert model(url).get_tool_calls_from_response(reply, error_on_no_tool_call=False) == []


def check_structured_output(url: str) -> None:
    for options in ({}, {"should_use_structured_outputs": True}):
        reply = model_for_json(url, **options).structured_predict(Visit, PromptTemplate(QUESTION))
        assert isinstance(reply, Visit)
    wanted = {"type": "json_schema", "json_schema": {"name": "visit", "schema": VISIT}}
    reply = model_for_json(url).chat(QUESTIONS, response_format=wanted)
    assert json.loads(reply.message.content or "")["day"] in DAYS


def check_log_probabilities(url: str) -> None:
    reply = model(url, logprobs=True, top_logprobs=2, max_tokens=3).chat(QUESTIONS)
    assert "".join(ones[0].token for ones in reply.logprobs or ()) == reply.message.content


def check_errors(url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        model(url, model="nobody").chat(QUESTIONS)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        model(url, additional_kwargs={"top_p": 2}).chat(QUESTIONS)
    assert (bad.value.code, bad.value.param) == ("invalid_value", "top_p")
    with pytest.raises(openai.BadRequestError) as long:
        model(url).chat([ChatMessage(role="user", content=TOO_LONG)])
    assert long.value.code == "context_length_exceeded"


def check_an_unavailable_adapter_is_retried_when_told(url: str) -> None:
    with front_of(url, refusals=[errors.AdapterUnavailable("wait a second")]) as front:
        assert model(front.url, max_retries=1, max_tokens=1).chat(QUESTIONS)
    assert front.times[1] - front.times[0] >= 1


def check_what_cannot_be_mended_is_not_retried(url: str) -> None:
    with front_of(url) as front, pytest.raises(openai.NotFoundError):
        model(front.url, model="nobody", max_retries=2).chat(QUESTIONS)
    assert len(front.paths) == 1


def check_a_timeout_aborts_the_request(url: str) -> None:
    with aborted(url), pytest.raises(openai.APITimeoutError):
        model(url, timeout=0.3, max_tokens=900, additional_kwargs={"extra_body": ENDLESS}).chat(QUESTIONS)
