"""What an answer took, as it is told: the tokens that the engine had read before are told apart."""

import json
from typing import Any

import pytest

from tests.service import Service

LONG = [{"role": "user", "content": "感冒有什么症状？应该怎么办？" * 30}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": LONG, "max_tokens": 4},
    "/v1/completions": {"prompt": LONG[0]["content"], "max_tokens": 4},
    "/v1/responses": {"input": LONG, "max_output_tokens": 4},
    "/v1/messages": {"messages": LONG, "max_tokens": 4},
}

CHAT = "/v1/chat/completions"


def usage(service: Service, path: str, *, stream: bool, **more: Any) -> dict[str, Any]:
    body = {"model": "leaflet", "temperature": 0, **BODIES[path], "stream": stream, **more}
    if stream and path.endswith("completions"):
        body["stream_options"] = {"include_usage": True}
    status, reply = service.call("POST", path, body)
    assert status == 200, reply
    if not stream:
        return dict(reply["usage"])
    found: dict[str, Any] = {}
    for line in reply.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        for holder in (event, event.get("response") or {}, event.get("message") or {}):
            found |= {key: value for key, value in (holder.get("usage") or {}).items() if value is not None}
    return found


def told(path: str, usage: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and how many of them were read before."""
    if path == "/v1/messages":
        cached = usage.get("cache_read_input_tokens") or 0
        return usage["input_tokens"] + cached, cached
    if path == "/v1/responses":
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", BODIES)
def test_tokens_read_before_are_told(service: Service, path: str, stream: bool) -> None:
    usage(service, path, stream=False)
    total, cached = told(path, usage(service, path, stream=stream))
    assert 0 < cached < total


def test_a_prompt_of_its_own_was_not_read_before(service: Service) -> None:
    for stream in (False, True):
        messages = [{"role": "user", "content": f"{stream} 0815 {LONG[0]['content']}"}]
        _, cached = told(
            "/v1/chat/completions", usage(service, "/v1/chat/completions", stream=stream, messages=messages)
        )
        assert cached == 0
