"""OpenAI's client: retries, timeouts, and what may come in the midst of a stream. For every major version since 1."""

import json
from collections.abc import Callable
from threading import Timer

import openai
import pytest

from app import errors
from tests.clients.front import front_of
from tests.clients.openai_chat import ask, client, refused
from tests.clients.served import ENDLESS, aborted, all_places_taken


def check_too_many_requests_are_retried_when_told(url: str) -> None:
    with front_of(url) as front, all_places_taken(url) as places:
        Timer(0.5, places.close).start()
        assert client(front.url, max_retries=1).chat.completions.create(**ask(max_tokens=1)).id
    assert front.times[1] - front.times[0] >= 1


def check_too_many_requests_in_the_end_are_an_error(url: str) -> None:
    with all_places_taken(url), pytest.raises(openai.RateLimitError) as caught:
        client(url).chat.completions.create(**ask())
    assert (caught.value.type, caught.value.code) == ("rate_limit_error", "too_many_requests")


def check_an_unavailable_adapter_is_retried_when_told(url: str) -> None:
    with front_of(url, refusals=[errors.AdapterUnavailable("wait a second")]) as front:
        assert client(front.url, max_retries=1).chat.completions.create(**ask(max_tokens=1)).id
    assert front.times[1] - front.times[0] >= 1


def check_what_cannot_be_mended_is_not_retried(url: str) -> None:
    with front_of(url) as front:
        create = client(front.url, max_retries=2).chat.completions.create
        refused(openai.BadRequestError, create, **ask(temperature=-1))
        refused(openai.NotFoundError, create, **ask(model="nobody"))
    assert len(front.paths) == 2


def check_a_failure_that_would_come_again_is_not_retried(url: str) -> None:
    failure = errors.EngineFailed("the engine failed on this request")
    with front_of(url, refusals=[failure]) as front, pytest.raises(openai.InternalServerError) as caught:
        client(front.url, max_retries=2).chat.completions.create(**ask())
    assert (caught.value.type, caught.value.code) == ("server_error", "engine_failed")
    assert len(front.paths) == 1


def check_a_timeout_aborts_the_request(url: str) -> None:
    with aborted(url), pytest.raises(openai.APITimeoutError):
        client(url, timeout=0.3).chat.completions.create(**ask(max_tokens=900, extra_body=ENDLESS))


def check_a_stream_that_is_closed_is_aborted(url: str) -> None:
    with aborted(url):
        stream = client(url).chat.completions.create(**ask(max_tokens=900, extra_body=ENDLESS, stream=True))
        next(iter(stream))
        stream.close()


def _with_event(event: str) -> Callable[[bytes], bytes]:
    """Put an event after the second of a stream."""

    def change(stream: bytes) -> bytes:
        first, second, rest = stream.split(b"\n\n", 2)
        return b"\n\n".join((first, second, event.encode(), rest))

    return change


def check_comments_in_a_stream_are_no_harm(url: str) -> None:
    with front_of(url, change=_with_event(": ping")) as front:
        chunks = [chunk.choices[0] for chunk in client(front.url).chat.completions.create(**ask(stream=True))]
    (whole,) = client(url).chat.completions.create(**ask()).choices
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [whole.finish_reason]


def check_an_error_in_a_stream_is_raised(url: str) -> None:
    body = json.dumps(errors.body(errors.EngineUnavailable("the engine stopped")))
    with front_of(url, change=_with_event(f"data: {body}")) as front:
        stream = client(front.url).chat.completions.create(**ask(stream=True))
        assert [next(stream).choices[0].index for _ in range(2)] == [0, 0]
        with pytest.raises(openai.APIError) as caught:
            next(stream)
    assert (caught.value.type, caught.value.code) == ("server_error", "engine_unavailable")
    assert caught.value.message == "the engine stopped"
