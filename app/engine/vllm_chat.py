"""vLLM's chat serving, made ours: one adapter a request, our errors, tokens counted as they come.

With app.engine.vllm, the only place that names vLLM's symbols.
"""

import copy
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.renderers import hf
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.exceptions import EngineDeadError

from app import errors
from app.engine.base import OnTokens
from app.engine.template import Template

_STAND_IN = "{{ messages }}"
"""What vLLM is told in place of an adapter's chat template, which it would compile here. It finds that contents are
handed over as texts, as they are in training."""


class _OneModel(OpenAIServingModels):
    """The only model vLLM's serving code sees while it answers one request: the one that is leased."""

    def __init__(self, name: str, lora: LoRARequest | None) -> None:
        self._name = name
        self.lora_requests = {} if lora is None else {name: lora}
        self.base_model_paths = [BaseModelPath(name, name)]

    def is_base_model(self, model_name: str) -> bool:
        return model_name == self._name and not self.lora_requests

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return self._name  # the reply echoes what was asked, not name@revision


class Chat(OpenAIServingChat):
    """vLLM's chat serving with our errors. A shallow copy serves each request."""

    failure: errors.ApiError | None = None
    on_tokens: OnTokens

    def for_one_request(
        self,
        model: str,
        lora: LoRARequest | None,
        fingerprint: str,
        on_tokens: OnTokens,
        renderer: OnlineRenderer,
    ) -> "Chat":
        one = copy.copy(self)
        one.models = _OneModel(model, lora)
        one.online_renderer = renderer
        one.system_fingerprint = fingerprint
        one.on_tokens = on_tokens
        return one

    def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncIterator[RequestOutput], *arguments: Any, **options: Any
    ) -> AsyncGenerator[str, None]:
        return super().chat_completion_stream_generator(
            request, _counted(result_generator, self.on_tokens), *arguments, **options
        )

    def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncIterator[RequestOutput], *arguments: Any, **options: Any
    ) -> Coroutine[Any, Any, Any]:
        return super().chat_completion_full_generator(
            request, _counted(result_generator, self.on_tokens), *arguments, **options
        )

    def create_streaming_error_response(
        self,
        message: str | Exception,
        err_type: str = "BadRequestError",
        status_code: HTTPStatus = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
    ) -> str:
        """The event that ends a broken stream; `failure` keeps it, for when no status was sent yet."""
        if isinstance(message, Exception):
            self.failure = self.translated(message)
        else:
            self.failure = api_error(create_error_response(message, err_type, status_code, param))
        return json.dumps(errors.body(self.failure))

    def translated(self, error: Exception) -> errors.ApiError:
        if isinstance(error, EngineDeadError) or self.engine_client.errored:
            return unavailable()
        if isinstance(error, ChatTemplateResolutionError):
            return errors.BadRequest(
                "this base model has no chat template: ask for an adapter that brings its own, or start the service "
                "with a chat_template.jinja in the base model's folder",
                code="no_chat_template",
                param="model",
            )
        return api_error(create_error_response(error))


def rendering_with(online: OnlineRenderer, template: Template) -> OnlineRenderer:
    """A copy of vLLM's renderer that has prompts made by an adapter's chat template, outside of this process."""
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


async def _counted(
    outputs: AsyncIterator[RequestOutput], on_tokens: OnTokens
) -> AsyncGenerator[RequestOutput, None]:
    async for output in outputs:
        on_tokens(len(output.prompt_token_ids or ()), sum(len(one.token_ids) for one in output.outputs))
        yield output


async def continued(first: str, rest: AsyncGenerator[str], chat: Chat) -> AsyncGenerator[str]:
    try:
        yield first
        async for event in rest:
            yield event
            if chat.failure is not None:
                return  # an error event is the last: no [DONE] after it
    finally:
        await rest.aclose()  # a client that leaves aborts its request in the engine


def unavailable() -> errors.EngineUnavailable:
    """What every request gets while there is no engine."""
    return errors.EngineUnavailable("the engine stopped and is being restarted; try again in a moment")


def bad_request(error: ValidationError) -> errors.BadRequest:
    """The first problem of a request body, by the field it lies in; values are not repeated."""
    first = error.errors(include_input=False, include_url=False)[0]
    fields = [str(part) for part in first["loc"] if not any(mark in str(part) for mark in "[(-")]
    param = ".".join(fields) or None
    missing = first["type"] == "missing"
    return errors.BadRequest(
        f"{param}: {first['msg']}" if param else first["msg"],
        code="missing_required_parameter" if missing else "invalid_value",
        param=param,
    )


def api_error(response: ErrorResponse) -> errors.ApiError:
    """vLLM's error as ours."""
    error = response.error
    if error.code == HTTPStatus.NOT_FOUND:
        return errors.ModelNotFound(error.message, param=error.param)
    if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
        return errors.EngineUnavailable(error.message, param=error.param)
    if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return errors.EngineFailed(error.message or "the engine failed on this request", param=error.param)
    too_long = "maximum context length" in error.message or "max_model_len" in error.message
    return errors.BadRequest(
        error.message, code="context_length_exceeded" if too_long else "invalid_value", param=error.param
    )
