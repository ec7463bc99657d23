"""vLLM's errors as ours: its own exceptions, built-in ones, and the error bodies that its serving code returns."""

from collections.abc import Sequence
from http import HTTPStatus

from pydantic import ValidationError
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.v1.engine.exceptions import EngineDeadError

from app import errors

_SLIPS = (AttributeError, KeyError, TypeError)
"""What Python says inside vLLM's validators where they did not expect a value."""
_TYPES = ("str", "int", "float", "bool", "dict", "list", "none")

_NO_PARSER = (
    "tools need a parser of the base model's tool calls, and this service was started without one: "
    "XINGLIN_TOOL_CALL_PARSER, or --tool-call-parser, names it"
)


def unavailable() -> errors.EngineUnavailable:
    """What every request gets while there is no engine."""
    return errors.EngineUnavailable("the engine stopped and is being restarted; try again in a moment")


def translated(error: Exception, *, is_dead: bool = False) -> errors.ApiError:
    """What a client is told of anything that vLLM raised, while the engine was dead or not."""
    if isinstance(error, errors.ApiError):
        return error
    if isinstance(error, EngineDeadError) or is_dead:
        return unavailable()
    if isinstance(error, ChatTemplateResolutionError):
        return errors.BadRequest(
            "this base model has no chat template: ask for an adapter that brings its own, or start the service "
            "with a chat_template.jinja in the base model's folder",
            code="no_chat_template",
            param="model",
        )
    return api_error(create_error_response(error))


def bad_request(error: Exception) -> errors.BadRequest:
    """What is wrong with a body that vLLM's models of requests do not take; values are not repeated."""
    if not isinstance(error, ValidationError):  # vLLM's validators raise errors that pydantic does not wrap
        param = getattr(error, "parameter", None)
        text = "a field has a value of the wrong type" if isinstance(error, _SLIPS) else str(error)
        return errors.BadRequest(text or "invalid request", code="invalid_value", param=param)
    # Of a value that may be one of several things, the likeliest is the one that went furthest.
    first = max(
        error.errors(include_input=False, include_url=False), key=lambda one: len(_fields(one["loc"]))
    )
    fields = _fields(first["loc"])
    param = ".".join(fields) or None
    missing = first["type"] == "missing"
    return errors.BadRequest(
        f"{param}: {first['msg']}" if param else first["msg"],
        code="missing_required_parameter" if missing else "invalid_value",
        param=param,
    )


def _fields(place: Sequence[int | str]) -> list[str]:
    """The fields on the way to a value, without what pydantic calls the types on it."""
    parts = [str(part) for part in place]
    return [
        p for p in parts if p not in _TYPES and not p[:1].isupper() and not any(mark in p for mark in "[(-")
    ]


def api_error(response: ErrorResponse) -> errors.ApiError:
    """An error body of vLLM's."""
    error = response.error
    if error.code == HTTPStatus.NOT_FOUND:
        return errors.ModelNotFound(error.message, param=error.param)
    if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
        return errors.EngineUnavailable(error.message, param=error.param)
    if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return errors.EngineFailed(error.message or "the engine failed on this request", param=error.param)
    if "maximum context length" in error.message or "max_model_len" in error.message:
        # LangChain looks for the code in the text.
        message = f"{error.message} (context_length_exceeded; `truncation: auto` leaves out the oldest turns)"
        return errors.BadRequest(message, code="context_length_exceeded", param=error.param)
    if "--tool-call-parser" in error.message or "--enable-auto-tool-choice" in error.message:
        return no_tool_parser()
    return errors.BadRequest(error.message, code="invalid_value", param=error.param)


def no_tool_parser() -> errors.BadRequest:
    """The answer to tools where nobody said how the base model writes its calls."""
    return errors.BadRequest(_NO_PARSER, code="tools_not_supported", param="tools")
