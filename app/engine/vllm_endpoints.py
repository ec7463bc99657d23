"""All endpoints of an engine: from a request body to a reply or a stream of events."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Self

import vllm.envs
from pydantic.json_schema import models_json_schema
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
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
from app.engine.base import Answer, Endpoint, Events, Parameters
from app.engine.history import Cut, Message, within
from app.engine.vllm_errors import api_error, bad_request, no_tool_parser
from app.engine.vllm_plain_text import let_text_be_text
from app.engine.vllm_responses import Responses
from app.engine.vllm_serving import Asked, Chat, ChatBatch, Completion, Messages, Tokenization, at_once

CONVERSATIONS = (Endpoint.CHAT, Endpoint.RESPONSES, Endpoint.MESSAGES)

_ROOM = 8
"""1 / _ROOM of the context is reserved for the answer, or less if the request's token limit is lower."""

_MOST_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""The endpoints' names for the maximum tokens of an answer."""

_REQUESTS = {
    Endpoint.CHAT: ChatCompletionRequest,
    Endpoint.CHAT_BATCH: BatchChatCompletionRequest,
    Endpoint.COMPLETIONS: CompletionRequest,
    Endpoint.RESPONSES: ResponsesRequest,
    Endpoint.MESSAGES: AnthropicMessagesRequest,
    Endpoint.COUNT_TOKENS: AnthropicCountTokensRequest,
    Endpoint.TOKENIZE: TokenizeChatRequest,  # or TokenizeCompletionRequest
    Endpoint.DETOKENIZE: DetokenizeRequest,
}

_TRUNCATION = {
    "properties": {
        "truncation": {
            "enum": ["auto", "disabled"],
            "description": "If a conversation is longer than the context: `auto` leaves out the oldest turns, "
            "`disabled` rejects the request. Default: the service's setting.",
        }
    }
}

MAX_SEQUENCES = 1024
"""Maximum sequences of one request: prompts times `n`. The engine keeps state for each."""


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
        truncates: bool,
        parses_text: bool,
        always_usage: bool,
        tokens_as_ids: bool,
    ) -> None:
        """`name`: the base model's name; `truncates`: default of `truncation`; `parses_text`: read control tokens in
        the text of messages; `always_usage`: report usage in all streams; `tokens_as_ids`: show ids in logprobs.

        Raises ValueError for unknown parsers.
        """
        self._llm = llm
        self._truncates = truncates
        self._always_usage = always_usage
        if not parses_text:
            let_text_be_text(llm.renderer)
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
        eos = llm.renderer.get_eos_token_id()
        of_requests: Any = llm.renderer
        of_requests.get_eos_token_id = lambda: (
            eos
        )  # transformers would look it up by its text for each request
        models = OpenAIServingModels(llm, [BaseModelPath(name, name)])
        common: dict[str, Any] = {"online_renderer": self.renderer, "request_logger": None}
        rendered = {**common, "chat_template": None, "chat_template_content_format": "auto"}
        generated = {
            "enable_prompt_tokens_details": True,
            "return_tokens_as_token_ids": tokens_as_ids,
        }
        parsed = {
            **rendered,
            **generated,
            "enable_auto_tools": tool_call_parser is not None,
            "tool_parser": tool_call_parser,
            "reasoning_parser": reasoning_parser or "",
        }
        try:
            self.chat = Chat(llm, models, "assistant", **parsed)
        except TypeError as error:  # raised by vLLM for an unknown parser
            raise ValueError(
                f"vLLM has no tool_call_parser {tool_call_parser!r} or no reasoning_parser {reasoning_parser!r}"
            ) from error
        self.chat_batch = ChatBatch(llm, models, "assistant", **parsed)
        self.completion = Completion(llm, models, **common, **generated)
        self.messages = Messages(llm, models, "assistant", **parsed)
        self.responses = Responses(llm, models, **parsed)
        self.responses.keep(stored_responses)
        self.tokenization = Tokenization(models, **rendered)
        self._ways: dict[Endpoint, tuple[Any, Callable[..., Any]]] = {
            Endpoint.CHAT: (self.chat, Chat.create_chat_completion),
            Endpoint.CHAT_BATCH: (self.chat_batch, ChatBatch.create_batch_chat_completion),
            Endpoint.COMPLETIONS: (self.completion, Completion.create_completion),
            Endpoint.RESPONSES: (self.responses, Responses.create_responses),
            Endpoint.MESSAGES: (self.messages, Messages.create_messages),
            Endpoint.COUNT_TOKENS: (self.messages, Messages.count_tokens),
            Endpoint.TOKENIZE: (self.tokenization, Tokenization.create_tokenize),
            Endpoint.DETOKENIZE: (self.tokenization, Tokenization.create_detokenize),
        }

    async def answer(self, endpoint: Endpoint, body: Mapping[str, Any], asked: Asked) -> Answer:
        """See Engine.answer."""
        if endpoint is not Endpoint.CHAT:  # chat rejects an empty list, as OpenAI does
            body = _without_empty_tools(body)
        if endpoint is Endpoint.CHAT_BATCH:
            _check_batch(body)
        if self._always_usage and endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
            body = _with_usage(body)
        truncation = _truncation(body) if endpoint in CONVERSATIONS else None
        if truncation and endpoint is not Endpoint.RESPONSES:  # vLLM's model has it only for Responses
            body = {key: value for key, value in body.items() if key != "truncation"}
        request, cut = _parsed(endpoint, body, asked.id), None
        if truncation == "auto" or (truncation is None and self._truncates and endpoint in CONVERSATIONS):
            body, cut = await self._within_context(endpoint, body, request, asked)
            request = _parsed(endpoint, body, asked.id)
        if endpoint is Endpoint.RESPONSES and self.responses.parser is None and _wants_tools(request):
            raise no_tool_parser()  # vLLM would silently ignore the tools
        reply = await self._reply(endpoint, request, asked)
        rest = self.responses.background_tasks.get(f"resp_{asked.id}")
        if cut and isinstance(reply, dict):
            reply["truncated"] = asdict(cut)
        return Answer(reply, cut, rest)

    async def _reply(self, endpoint: Endpoint, request: Any, asked: Asked) -> dict[str, Any] | Events:
        serving, method = self._ways[endpoint]
        one = serving.for_one(self._llm, asked)
        try:
            reply = await method(one, request, None)
            if isinstance(reply, AsyncGenerator):
                events = reply if one.is_plain else one.events(reply)
                first = await anext(events)
                if (
                    one.failure is not None
                ):  # raise instead of sending an error event, since no status was sent yet
                    await events.aclose()
                    raise one.failure
                return _Resumed(first, events)
        except errors.ApiError:
            raise
        except Exception as error:  # vLLM raises its own and built-in errors alike
            raise one.translated(error) from error
        if isinstance(reply, ErrorResponse):
            raise one.explained(api_error(reply))
        return dict(one.dumped(reply))

    async def _within_context(
        self, endpoint: Endpoint, body: Mapping[str, Any], request: Any, asked: Asked
    ) -> tuple[Mapping[str, Any], Cut | None]:
        """Return the body with a conversation short enough to leave room for an answer, and the part left out.

        Turns are left out only to reserve the smaller of an eighth of the context and the request's token limit; the
        limit is lowered to the tokens that remain. Raises BadRequest if the last turn alone is too long.
        """
        context = self._llm.model_config.max_model_len
        bounds = {name: bound for name in _MOST_TOKENS if (bound := getattr(request, name, None))}
        room = min([context // _ROOM, *bounds.values()])
        counter = self.tokenization.for_one(self._llm, asked)
        key = "input" if endpoint is Endpoint.RESPONSES else "messages"
        if not isinstance(body[key], list):
            return body, None

        async def count(messages: list[Message]) -> int:
            given = {**body, key: messages}
            if endpoint is Endpoint.MESSAGES:
                chat = self.messages.to_chat_completion_request(
                    AnthropicMessagesRequest.model_validate(given)
                )
                given = chat.model_dump(include={"messages", "tools"}, exclude_none=True)
            elif endpoint is Endpoint.RESPONSES:
                system = (
                    [{"role": "system", "content": given["instructions"]}]
                    if given.get("instructions")
                    else []
                )
                given = {"messages": [*system, *messages]}
            fields = TokenizeChatRequest.model_fields
            asked_for = {name: value for name, value in given.items() if name in fields}
            request = TokenizeChatRequest.model_validate({**asked_for, "model": asked.model})
            try:
                reply = await counter.create_tokenize(request, None)
            except Exception as error:  # as in _reply
                raise counter.translated(error) from error
            if isinstance(reply, ErrorResponse):
                raise api_error(reply)
            return int(reply.count)

        kept, tokens, cut = await within(body[key], context - room, count)
        if tokens >= context:
            raise errors.BadRequest(
                f"{key}: the last turn and the system prompt are {tokens} tokens, but the context is {context} tokens: "
                "shorten them (context_length_exceeded)",
                code=errors.Code.CONTEXT_LENGTH_EXCEEDED,
                param=key,
            )
        lowered = {name: min(bound, context - tokens) for name, bound in bounds.items()}
        return {**body, key: kept, **lowered}, cut


@functools.cache
def parameters() -> Parameters:
    """See Engine.parameters."""
    kinds: Any = {*_REQUESTS.values(), TokenizeCompletionRequest}
    schemas, parts = models_json_schema(
        sorted(((kind, "validation") for kind in kinds), key=lambda pair: pair[0].__name__),
        ref_template="#/components/schemas/{model}",
    )
    bodies: dict[Endpoint, dict[str, Any]] = {}
    for endpoint, kind in _REQUESTS.items():
        one: Any = schemas[kind, "validation"]
        if endpoint is Endpoint.TOKENIZE:
            one = {"anyOf": [one, schemas[TokenizeCompletionRequest, "validation"]]}
        elif endpoint in CONVERSATIONS:
            one = {"allOf": [one, _TRUNCATION]}
        bodies[endpoint] = one
    return Parameters(bodies, parts["$defs"])


def _truncation(body: Mapping[str, Any]) -> Any:
    """Return the conversation's `truncation` (as in OpenAI's Responses). Raises BadRequest."""
    truncation = body.get("truncation")
    if truncation not in (None, "auto", "disabled"):
        raise errors.BadRequest(
            "truncation: must be `auto` or `disabled`", code=errors.Code.INVALID_VALUE, param="truncation"
        )
    return truncation


def _parsed(endpoint: Endpoint, body: Mapping[str, Any], request_id: str) -> Any:
    """Parse a body to vLLM's request model. Raises BadRequest."""
    prefix = "resp_" if endpoint is Endpoint.RESPONSES else ""
    kind: Any = _REQUESTS[endpoint]
    if endpoint is Endpoint.TOKENIZE and body.get("messages") is None:
        kind = TokenizeCompletionRequest
    given = {**body, "request_id": f"{prefix}{request_id}"} if "request_id" in kind.model_fields else body
    try:
        request = kind.model_validate(given)
    except Exception as error:
        raise bad_request(error) from error
    _check_sequences(request)
    return request


def _check_batch(body: Mapping[str, Any]) -> None:
    """Raises BadRequest for fields that vLLM silently ignores in a batch of conversations."""
    for field in ("stream", "tools"):
        if body.get(field):
            raise errors.BadRequest(
                f"{field}: not supported for several conversations at once; send them one by one",
                code=errors.Code.INVALID_VALUE,
                param=field,
            )


def _with_usage(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the body with usage at the end of a stream. vLLM's own setting would put it into every chunk."""
    options = body.get("stream_options")
    if not body.get("stream") or not isinstance(options, dict | None):
        return body
    return {**body, "stream_options": {**(options or {}), "include_usage": True}}


def _without_empty_tools(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the body without an empty list of tools, which some agents send."""
    if body.get("tools") != []:
        return body
    wanted = body.get("tool_choice")
    kind = wanted.get("type") if isinstance(wanted, Mapping) else wanted
    unwanted = ("tools", "tool_choice") if kind in (None, "auto", "none") else ("tools",)
    return {key: value for key, value in body.items() if key not in unwanted}


def _wants_tools(request: Any) -> bool:
    return bool(request.tools) and request.tool_choice != "none"


def _check_sequences(request: Any) -> None:
    """Raises BadRequest if the request has too many sequences."""
    n = getattr(request, "n", None) or 1
    if n > vllm.envs.VLLM_MAX_N_SEQUENCES:
        raise errors.BadRequest(
            f"n: must be at most {vllm.envs.VLLM_MAX_N_SEQUENCES}", code=errors.Code.INVALID_VALUE, param="n"
        )
    param = "messages" if isinstance(request, BatchChatCompletionRequest) else "prompt"
    prompts = getattr(request, param, None)
    # One prompt may be a list of token ids.
    count = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    if count * n > MAX_SEQUENCES:
        raise errors.BadRequest(
            f"{param}: {count} prompts with {n} answers each exceed the limit of {MAX_SEQUENCES} sequences",
            code=errors.Code.INVALID_VALUE,
            param=param,
        )


class _Resumed:
    """Events whose first one was already read."""

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
