"""The usage of an answer, with cached prompt tokens reported separately."""

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
    """Return the number of prompt tokens, and how many of them were cached."""
    if path == "/v1/messages":
        cached = usage.get("cache_read_input_tokens") or 0
        return usage["input_tokens"] + cached, cached
    if path == "/v1/responses":
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", BODIES)
def test_cached_prompt_tokens_are_reported(service: Service, path: str, stream: bool) -> None:
    usage(service, path, stream=False)
    total, cached = told(path, usage(service, path, stream=stream))
    assert 0 < cached < total


def test_a_new_prompt_has_no_cached_tokens(service: Service) -> None:
    for stream in (False, True):
        messages = [{"role": "user", "content": f"{stream} 0815 {LONG[0]['content']}"}]
        _, cached = told(
            "/v1/chat/completions", usage(service, "/v1/chat/completions", stream=stream, messages=messages)
        )
        assert cached == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_bytes_of_logprobs_join_to_the_text(service: Service, stream: bool) -> None:
    """A token of the demo is often only part of a character."""
    with service.client() as client:
        for question in ("感冒有什么症状？", "痛风怎么办？", "What helps against gout?"):
            asked = {
                "model": "doctor", "messages": [{"role": "user", "content": question}], "temperature": 0,
                "logprobs": True, "top_logprobs": 2, "max_tokens": 60,
            }  # fmt: skip
            if stream:
                choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
                text = "".join(choice.delta.content or "" for choice in choices)
            else:
                choices = client.chat.completions.create(**asked).choices
                text = choices[0].message.content
            tokens = [one for choice in choices if choice.logprobs for one in choice.logprobs.content or ()]
            joined = b"".join(bytes(one.bytes or ()) for one in tokens if one.token != "<|im_end|>")
            assert joined.decode(errors="ignore") == text.rstrip("\ufffd")
            for one in tokens:
                assert [other.bytes for other in one.top_logprobs if other.logprob == one.logprob] == [
                    one.bytes
                ]
