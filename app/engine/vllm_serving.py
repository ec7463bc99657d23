"""vLLM's serving classes, extended: one adapter per request, our errors, and observers of the output.

Each class serves one or two endpoints; a shallow copy of it, with the request and its adapter, serves one request.
"""

import copy
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import GenerationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers import hf
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.engine.async_llm import AsyncLLM

from app import errors
from app.engine.base import Observer
from app.engine.fast_stream import Generation, chat_chunks, is_plain
from app.engine.template import Template
from app.engine.token_bytes import token_bytes
from app.engine.vllm_errors import api_error, cannot_be_followed, translated

_STAND_IN = "{{ messages }}"
"""Passed to vLLM instead of an adapter's chat template, which vLLM would compile in this process. It tells vLLM that
message contents are texts, as in training."""


_BROKEN_OFF = str(GenerationError())

_SHORT_MESSAGES = 32
_SHORT_CHARACTERS = 4096


@dataclass(frozen=True)
class Asked:
    """The facts of one request that are not in its body."""

    id: str
    model: str
    """The model name from the client, which replies repeat."""
    lora: LoRARequest | None
    renderer: OnlineRenderer
    has_own_template: bool
    stop: tuple[str | int, ...]
    """Stop texts and stop tokens of the adapter."""
    fingerprint: str
    observer: Observer


class _OneModel(OpenAIServingModels):
    """The only model that vLLM's serving code sees during one request: the leased one."""

    def __init__(self, name: str, lora: LoRARequest | None) -> None:
        self._name = name
        self.lora_requests = {} if lora is None else {name: lora}
        self.base_model_paths = [BaseModelPath(name, name)]

    def is_base_model(self, model_name: str) -> bool:
        return model_name == self._name and not self.lora_requests

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return self._name  # the reply repeats the requested name, not name@revision


class _Client:
    """The engine as vLLM's serving code sees it during one request.

    Its output goes to the observer, and ends at the adapter's stops in addition to the client's.
    """

    def __init__(self, llm: AsyncLLM, asked: Asked) -> None:
        self._llm = llm
        self._asked = asked
        self.is_guided = False
        """Whether the answer must follow a grammar."""
        self._choices = 0
        """Number of choices of all prompts so far."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> "_Outputs":
        self.is_guided = sampling_params.structured_outputs is not None
        own = self._end_as_taught(sampling_params)
        generation = Generation(self._llm, prompt, sampling_params, request_id, options, own)
        first_choice = self._choices
        self._choices += sampling_params.n
        return _Outputs(generation, generation.outputs(self._asked.observer, first_choice))

    def _end_as_taught(self, parameters: Any) -> list[int | str]:
        """Add the adapter's stops to the parameters; return those that the client did not set itself."""
        if parameters.ignore_eos:
            return []
        own = [
            stop for stop in self._asked.stop if stop not in (*parameters.stop, *parameters.stop_token_ids)
        ]
        tokens = [stop for stop in own if isinstance(stop, int)]
        if parameters.detokenize:
            parameters.stop = [*parameters.stop, *(stop for stop in own if isinstance(stop, str))]
        parameters.stop_token_ids = [*parameters.stop_token_ids, *tokens]
        parameters.all_stop_token_ids.update(tokens)  # suppressed before min_tokens
        return own


class _Outputs:
    """The outputs of `AsyncLLM.generate`; the fast stream reads `generation` instead."""

    def __init__(self, generation: Generation, outputs: AsyncGenerator[RequestOutput, None]) -> None:
        self.generation = generation
        self._outputs = outputs

    def __aiter__(self) -> AsyncGenerator[RequestOutput, None]:
        return self._outputs

    def __anext__(self) -> Awaitable[RequestOutput]:
        return self._outputs.__anext__()

    def aclose(self) -> Awaitable[None]:
        return self._outputs.aclose()


class Ours:
    """Shared code of our serving classes."""

    asked: Asked
    engine_client: Any
    failure: errors.ApiError | None = None
    is_plain = False
    """Whether app.engine.fast_stream makes the stream, which then is ready to send."""

    def for_one(self, llm: AsyncLLM, asked: Asked) -> Self:
        """Return a copy that answers one request."""
        one: Any = copy.copy(self)
        one.asked = asked
        one.models = _OneModel(asked.model, asked.lora)
        one.online_renderer = asked.renderer
        one.engine_client = _Client(llm, asked)
        one.system_fingerprint = asked.fingerprint
        return one

    def _base_request_id(self, _raw_request: object, _default: str | None = None) -> str:
        return self.asked.id  # unique, since a duplicate id is an error in the engine

    def create_streaming_error_response(
        self,
        message: str | Exception,
        err_type: str = "BadRequestError",
        status_code: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
    ) -> str:
        """Return the event that ends a failed stream; keep the error in `failure`."""
        if isinstance(message, Exception):
            self.failure = self.translated(message)
        else:
            self.failure = self.explained(
                api_error(create_error_response(message, err_type, status_code, param))
            )
        return json.dumps(errors.body(self.failure))

    def translated(self, error: Exception) -> errors.ApiError:
        """Return the client's error for `error`."""
        return self.explained(translated(error, is_dead=self.engine_client.errored))

    def explained(self, error: errors.ApiError) -> errors.ApiError:
        """Return the client's error; a failed answer with a grammar is a bad request, since its grammar is invalid."""
        broken_off = isinstance(error, errors.EngineFailed) and str(error) == _BROKEN_OFF
        return cannot_be_followed() if broken_off and self.engine_client.is_guided else error

    async def events(self, stream: AsyncGenerator[str]) -> AsyncGenerator[bytes]:
        """Yield the stream's events as bytes. After an error event, raise the error."""
        try:
            async for event in stream:
                yield event.encode()
                if self.failure is not None:
                    raise self.failure
        finally:
            await stream.aclose()  # aborts the request in the engine if the client disconnected

    def dumped(self, reply: Any) -> dict[str, Any]:
        """Return a whole reply as a dict."""
        return dict(reply.model_dump())


class Chat(Ours, OpenAIServingChat):
    """POST /v1/chat/completions."""

    def chat_completion_stream_generator(
        self,
        request: Any,
        result_generator: Any,
        request_id: str,
        model_name: str,
        *arguments: Any,
        **options: Any,
    ) -> AsyncGenerator[Any, None]:
        """See vLLM's; most streams come from app.engine.fast_stream."""
        if self.parser_cls is not None or not is_plain(request):
            return super().chat_completion_stream_generator(
                request, result_generator, request_id, model_name, *arguments, **options
            )
        self.is_plain = True
        return chat_chunks(
            request,
            result_generator.generation,
            request_id,
            model_name,
            role=self.get_chat_request_role(request),
            fingerprint=self.asked.fingerprint,
            observer=self.asked.observer,
            translated=self.translated,
        )

    def _create_chat_logprobs(
        self, token_ids: Any, top_logprobs: Any, tokenizer: Any, *arguments: Any, **options: Any
    ) -> Any:
        """See vLLM's, whose bytes come from the token's text and are wrong for a part of a character."""
        found = super()._create_chat_logprobs(token_ids, top_logprobs, tokenizer, *arguments, **options)
        if tokenizer is None:
            return found
        of_token = token_bytes(tokenizer)
        for entry, token_id, alternatives in zip(found.content or (), token_ids, top_logprobs, strict=False):
            _set_bytes(entry, of_token.of(token_id))
            for other, other_id in zip(entry.top_logprobs, alternatives or (), strict=False):
                _set_bytes(other, of_token.of(other_id))
        return found


class ChatBatch(Chat, OpenAIServingChatBatch):
    """POST /v1/chat/completions/batch."""


def _set_bytes(entry: Any, found: bytes | None) -> None:
    if found is not None:
        entry.bytes = list(found)


class Completion(Ours, OpenAIServingCompletion):
    """POST /v1/completions."""


class Tokenization(Ours, ServingTokenization):
    """POST /tokenize and /detokenize."""


class Messages(Ours, AnthropicServingMessages):
    """POST /v1/messages and /v1/messages/count_tokens, by way of the chat above."""

    def for_one(self, llm: AsyncLLM, asked: Asked) -> Self:
        """See Ours. Merges system messages for an adapter's own template, which may not accept a second one."""
        one = super().for_one(llm, asked)
        one._merge_inline_system = self._merge_inline_system or asked.has_own_template
        return one

    async def events(self, stream: AsyncGenerator[str]) -> AsyncGenerator[bytes]:
        """See Ours; vLLM would replace our error event, which it does not understand, with its own error."""
        try:
            async for event in stream:
                if self.failure is not None:
                    data = json.dumps(errors.anthropic_body(self.failure))
                    yield f"event: error\ndata: {data}\n\n".encode()
                    raise self.failure
                yield event.encode()
        finally:
            await stream.aclose()

    def dumped(self, reply: Any) -> dict[str, Any]:
        """See Ours."""
        return dict(reply.model_dump(exclude_none=True))


def is_short(body: Mapping[str, Any]) -> bool:
    """Check whether the prompt renders so fast (a fraction of a millisecond) that other requests can wait for it."""
    messages = body.get("messages")
    if not isinstance(messages, list) or len(messages) > _SHORT_MESSAGES or "tools" in body:
        return False
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
    texts = [content for content in contents if isinstance(content, str)]
    return len(texts) == len(contents) and sum(map(len, texts)) <= _SHORT_CHARACTERS


def at_once(online: OnlineRenderer) -> OnlineRenderer:
    """Return a copy of vLLM's renderer that renders short text prompts directly on the event loop.

    Passing a short prompt to a thread, through tasks and a pool of tokenizers, takes longer than rendering it.
    """
    renderer = copy.copy(online.renderer)
    renderer.tokenizer = cached_tokenizer_from_config(online.model_config)  # the pool has copies of it

    async def render_chat(*arguments: Any, **options: Any) -> Any:
        return renderer.render_chat(*arguments, **options)

    renderer.render_chat_async = render_chat
    one = copy.copy(online)
    one.renderer = renderer
    return one


def rendering_with(online: OnlineRenderer, template: Template) -> OnlineRenderer:
    """Return a copy of vLLM's renderer that renders an adapter's chat template in the template's own process."""
    special_tokens = dict(online.renderer.tokenizer.special_tokens_map)

    async def apply(_config: Any, _tokenizer: Any, conversation: Any, **variables: Any) -> str:
        if any(message["role"] == "developer" for message in conversation) and (
            not hf._detect_developer_role_support(template.text)
        ):
            conversation = hf._consolidate_system_messages(hf._convert_developer_to_system(conversation))
        for of_vllm in ("chat_template", "tokenize", "return_dict"):
            variables.pop(of_vllm, None)
        given = {"tools": None, "documents": None, **special_tokens, **variables, "messages": conversation}
        return await template.render(given)

    renderer = copy.copy(online.renderer)
    renderer._apply_chat_template_async = apply
    one = copy.copy(online)
    one.renderer = renderer
    one.chat_template = _STAND_IN
    return one
