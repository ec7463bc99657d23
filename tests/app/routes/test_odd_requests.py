"""Client errors on all endpoints: a 4xx with a clear message, never a server error."""

import json
from typing import Any

import pytest

from tests.service import Service

MESSAGES = [{"role": "user", "content": "感冒有什么症状？"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 6},
    "/v1/completions": {"prompt": "感冒", "max_tokens": 6},
    "/v1/responses": {"input": "感冒", "max_output_tokens": 6},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 6},
}
CHAT, COMPLETIONS, RESPONSES, ANTHROPIC = BODIES
ENDLESS = {"$ref": "#"}
NO_GRAMMAR = "cannot make a grammar"


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


def guided(**how: Any) -> dict[str, Any]:
    return {"structured_outputs": how}


# Path, what is wrong, the field that is named, and a part of the message
MISTAKES: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, guided(grammar="root ::= "), None, NO_GRAMMAR),
    (CHAT, guided(grammar="root ::= root"), None, NO_GRAMMAR),
    (CHAT, guided(json=ENDLESS), None, NO_GRAMMAR),
    (CHAT, {"response_format": schema(ENDLESS)}, None, NO_GRAMMAR),
    (COMPLETIONS, guided(grammar="root ::= "), None, NO_GRAMMAR),
    (COMPLETIONS, {"response_format": schema(ENDLESS)}, None, NO_GRAMMAR),
    (CHAT, guided(grammar="x"), None, "grammar"),
    (CHAT, guided(regex="("), None, "unclosed group"),
    (CHAT, guided(regex="a{5,2}"), None, "repetition"),
    (CHAT, guided(choice=[]), None, "empty list"),
    (CHAT, guided(choice=[1]), "structured_outputs.choice.0", "must be text"),
    (CHAT, guided(json="{"), None, "JSON"),
    (CHAT, guided(json={"type": "nonsense"}), None, "nonsense"),
    (CHAT, guided(json={"$ref": "#/defs/none"}), None, "does not exist"),
    (CHAT, guided(structural_tag="x"), "structured_outputs", "structural"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "must be"),
    (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 entries"),
    (CHAT, {"stop_token_ids": [10**9]}, "stop_token_ids", "out-of-vocab"),
    (CHAT, {"stop_token_ids": ["x"]}, "stop_token_ids.0", "must be a whole number"),
    (CHAT, {"logit_bias": {"99999999": 5}}, "logit_bias", "out-of-vocab"),
    (CHAT, {"logit_bias": {"x": 5}}, "logit_bias", "cannot be converted"),
    (CHAT, {"allowed_token_ids": [10**9]}, "allowed_token_ids", "out-of-vocab"),
    (CHAT, {"temperature": "hot", "n": "x"}, "n", "n: must be a whole number; temperature: must be a number"),
    (CHAT, {"min_p": 5}, "min_p", "must be in [0, 1]"),
    (CHAT, {"n": 0}, "n", "at least 1"),
    (CHAT, {"seed": 2**70}, "seed", "must be at most"),
    (CHAT, {"logprobs": True, "top_logprobs": 1000}, "logprobs", "20"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "must be"),
    (CHAT, {"messages": []}, None, "at least one message"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "tools"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt.0", "must be at least 0"),
    (COMPLETIONS, {"prompt": [10**9]}, None, "out of vocabulary"),
    (COMPLETIONS, {"prompt": [[1], []]}, None, "empty"),
    (RESPONSES, {"previous_response_id": "resp_x"}, "previous_response_id", "no such response"),
    (RESPONSES, {"input": [{"role": "user"}]}, "input.0.content", "is missing"),
    (RESPONSES, {"text": {"format": {"type": "nonsense"}}}, "text.format.type", "must be"),
    (ANTHROPIC, {"max_tokens": 0}, None, "positive"),
    (ANTHROPIC, {"stop_sequences": list("abcde")}, None, "at most 4 entries"),
    (ANTHROPIC, {"system": 5}, None, "must be"),
    (ANTHROPIC, {"temperature": 5}, None, "must be in [0, 2]"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_client_errors_are_named(service: Service, stream: bool) -> None:
    for path, wrong, param, part in MISTAKES:
        body = {"model": "doctor", **BODIES[path], **wrong, "stream": stream}
        status, reply = service.call("POST", path, body)
        where = f"{path} {json.dumps(wrong)}: {status} {reply}"
        assert 400 <= status < 500, where
        assert isinstance(reply, dict), where
        error = reply["error"]
        assert part in error["message"], where
        assert "parameter=" not in error["message"], where
        if path == ANTHROPIC:
            assert (reply["type"], error["type"]) == ("error", "invalid_request_error"), where
        else:
            assert (error["param"], error["type"]) == (param, "invalid_request_error"), where


def test_a_missing_previous_response_has_its_own_code(service: Service) -> None:
    body = {"model": "doctor", "input": "a", "previous_response_id": "resp_x"}
    status, reply = service.call("POST", RESPONSES, body)
    assert (status, reply["error"]["code"]) == (404, "previous_response_not_found")


def test_an_error_in_a_started_stream_is_its_last_event(service: Service) -> None:
    """The first event of a response is sent before the engine sees the request."""
    format_ = {"type": "json_schema", "name": "a", "schema": ENDLESS}
    body = {"model": "doctor", **BODIES[RESPONSES], "text": {"format": format_}}
    status, reply = service.call("POST", RESPONSES, body)
    assert (status, reply["error"]["code"]) == (400, "invalid_value")
    assert NO_GRAMMAR in reply["error"]["message"]
    _, events = service.call("POST", RESPONSES, {**body, "stream": True})
    assert NO_GRAMMAR in events.strip().split("\n\n")[-1]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_an_empty_list_of_tools_requests_no_tools(service: Service, choice: str | None) -> None:
    for path, body in BODIES.items():
        if path in (CHAT, COMPLETIONS):
            continue
        said = {"type": choice} if path == ANTHROPIC else choice
        tools = {"tools": [], "tool_choice": said} if choice else {"tools": []}
        status, reply = service.call("POST", path, {"model": "doctor", **body, **tools})
        assert status == 200, (path, reply)
    body = {"model": "doctor", "messages": MESSAGES}
    paths = ("/v1/messages/count_tokens", "/tokenize")
    for path in paths:
        assert service.call("POST", path, {**body, "tools": []}) == service.call("POST", path, body)
