"""vLLM's errors as ours: its own exceptions, built-in ones, and the error bodies that its serving code returns."""

from http import HTTPStatus

from pydantic import ValidationError
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.v1.engine.exceptions import EngineDeadError

from app import errors


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
        return errors.BadRequest(str(error) or "invalid request", code="invalid_value", param=param)
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
    """An error body of vLLM's."""
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
