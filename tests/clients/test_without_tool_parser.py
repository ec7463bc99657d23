"""What clients are told that ask for tools of a service that cannot read tool calls."""

from typing import Any

import anthropic
import openai
import pytest

from tests.clients.anthropic_messages import TOOL as TOOL_OF_MESSAGES
from tests.clients.anthropic_messages import ask as ask_for_message
from tests.clients.openai_chat import BOOK, TOOL
from tests.clients.openai_chat import ask as ask_for_chat
from tests.clients.openai_responses import TOOL as TOOL_OF_RESPONSES
from tests.clients.openai_responses import ask as ask_for_response
from tests.service import Service

SETTING = "XINGLIN_TOOL_CALL_PARSER"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", BOOK])
def test_chat(service: Service, choice: Any, stream: bool) -> None:
    wanted = ask_for_chat(tools=[TOOL], tool_choice=choice, stream=stream)
    with service.client() as client, pytest.raises(openai.BadRequestError, match=SETTING):
        client.chat.completions.create(**wanted)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "book"}])
def test_responses(service: Service, choice: Any) -> None:
    wanted = ask_for_response(tools=[TOOL_OF_RESPONSES], tool_choice=choice)
    with service.client() as client, pytest.raises(openai.BadRequestError, match=SETTING):
        client.responses.create(**wanted)


@pytest.mark.parametrize("kind", ["auto", "any"])
def test_messages(service: Service, kind: str) -> None:
    wanted = ask_for_message(tools=[TOOL_OF_MESSAGES], tool_choice={"type": kind})
    client = anthropic.Anthropic(base_url=service.url, api_key="unused", max_retries=0)
    with client, pytest.raises(anthropic.BadRequestError, match=SETTING):
        client.messages.create(**wanted)


def test_tools_that_are_not_to_be_called(service: Service) -> None:
    with service.client() as client:
        reply = client.chat.completions.create(**ask_for_chat(tools=[TOOL], tool_choice="none"))
    assert reply.choices[0].message.content
