"""Every endpoint that an engine answers: a body in, a reply or a stream of events out."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Self

from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM

from app import errors
from app.engine.base import Endpoint, Events
from app.engine.vllm_errors import api_error, bad_request
from app.engine.vllm_responses import Responses
from app.engine.vllm_serving import Asked, Chat, Completion, Messages, Tokenization, at_once

MAX_SEQUENCES = 1024
"""Of one request: prompts times `n`. The engine keeps state for each."""


class Endpoints:
    """vLLM's serving classes over one engine."""

    def __init__(
        self,
        llm: AsyncLLM,
        name: str,
        *,
        tool_call_parser: str | None,
        reasoning_parser: str | None,
        stored_responses: int,
    ) -> None:
        """`name`: of the base model. Raises ValueError for parsers that vLLM does not have."""
        self._llm = llm
        self.renderer = OnlineRenderer(
            llm.model_config,
            llm.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=tool_call_parser is not None,
            tool_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
        )
        self.quick_renderer = at_once(self.renderer)
        models = OpenAIServingModels(llm, [BaseModelPath(name, name)])
        common: dict[str, Any] = {"online_renderer": self.renderer, "request_logger": None}
        rendered = {**common, "chat_template": None, "chat_template_content_format": "auto"}
        parsed = {
            **rendered,
            "enable_auto_tools": tool_call_parser is not None,
            "tool_parser": tool_call_parser,
            "reasoning_parser": reasoning_parser or "",
        }
        try:
            self.chat = Chat(llm, models, "assistant", **parsed)
        except TypeError as error:  # vLLM's way of saying so
            raise ValueError(
                f"vLLM has no tool_call_parser {tool_call_parser!r} or no reasoning_parser {reasoning_parser!r}"
            ) from error
        self.completion = Completion(llm, models, **common)
        self.messages = Messages(llm, models, "assistant", **parsed)
        self.responses = Responses(llm, models, **parsed)
        self.responses.keep(stored_responses)
        self.tokenization = Tokenization(models, **rendered)

    async def answer(
        self, endpoint: Endpoint, body: Mapping[str, Any], asked: Asked
    ) -> dict[str, Any] | Events:
        """See Engine.answer."""
        request = _parsed(endpoint, body, asked.id)
        serving, method = self._for(endpoint)
        one = serving.for_one(self._llm, asked)
        try:
            reply = await method(one, request, None)
            if isinstance(reply, AsyncGenerator):
                events = reply if one.is_plain else one.events(reply)
                first = await anext(events)
                if one.failure is not None:  # an error, and not an event: no status was sent yet
                    await events.aclose()
                    raise one.failure
                return _Resumed(first, events)
        except errors.ApiError:
            raise
        except Exception as error:  # vLLM raises its own and built-in errors alike
            raise one.translated(error) from error
        if isinstance(reply, ErrorResponse):
            raise api_error(reply)
        return dict(one.dumped(reply))

    def _for(self, endpoint: Endpoint) -> tuple[Any, Callable[..., Any]]:
        return {
            Endpoint.CHAT: (self.chat, Chat.create_chat_completion),
            Endpoint.COMPLETIONS: (self.completion, Completion.create_completion),
            Endpoint.RESPONSES: (self.responses, Responses.create_responses),
            Endpoint.MESSAGES: (self.messages, Messages.create_messages),
            Endpoint.COUNT_TOKENS: (self.messages, Messages.count_tokens),
            Endpoint.TOKENIZE: (self.tokenization, Tokenization.create_tokenize),
            Endpoint.DETOKENIZE: (self.tokenization, Tokenization.create_detokenize),
        }[endpoint]


def _parsed(endpoint: Endpoint, body: Mapping[str, Any], request_id: str) -> Any:
    """vLLM's model of the request. Raises BadRequest."""
    prefix = "resp_" if endpoint is Endpoint.RESPONSES else ""
    kind: Any = {
        Endpoint.CHAT: ChatCompletionRequest,
        Endpoint.COMPLETIONS: CompletionRequest,
        Endpoint.RESPONSES: ResponsesRequest,
        Endpoint.MESSAGES: AnthropicMessagesRequest,
        Endpoint.COUNT_TOKENS: AnthropicCountTokensRequest,
        Endpoint.TOKENIZE: TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest,
        Endpoint.DETOKENIZE: DetokenizeRequest,
    }[endpoint]
    given = {**body, "request_id": f"{prefix}{request_id}"} if "request_id" in kind.model_fields else body
    try:
        request = kind.model_validate(given)
    except Exception as error:
        raise bad_request(error) from error
    prompts = getattr(request, "prompt", None)
    # One prompt may be a list of token ids.
    count = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    if count * (getattr(request, "n", None) or 1) > MAX_SEQUENCES:
        raise errors.BadRequest(
            f"prompt: {count} prompts, `n` answers each, are more than {MAX_SEQUENCES}",
            code="invalid_value",
            param="prompt",
        )
    return request


class _Resumed:
    """Events of which the first was taken already."""

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        self._first: bytes | None = first
        self._rest = rest

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[bytes]:
        if self._first is None:
            return self._rest.__anext__()
        first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        first.set_result(self._first)
        self._first = None
        return first

    def aclose(self) -> Awaitable[None]:
        return self._rest.aclose()
