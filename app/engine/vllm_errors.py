"""Translate vLLM's errors to ours: its exceptions, built-in ones, and the error bodies of its serving code."""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.v1.engine.exceptions import EngineDeadError

from adapters.wording import in_words
from app import errors

_SLIPS = (AttributeError, KeyError, TypeError)
"""Python's errors inside vLLM's validators for values that they do not expect."""
_TYPES = ("str", "int", "float", "bool", "dict", "list", "none")

_MOST_PROBLEMS = 5
_APPENDIX = re.compile(r" \(parameter=.*\)$", re.DOTALL)
_FIELD = re.compile(r"([a-z]\w*) must ")

_NO_PARSER = (
    "tools need a parser of the base model's tool calls, but this service has none: "
    "set XINGLIN_TOOL_CALL_PARSER or --tool-call-parser"
)


def unavailable() -> errors.EngineUnavailable:
    """Return the error for requests while there is no engine."""
    return errors.EngineUnavailable("the engine stopped and is being restarted; try again in a moment")


def translated(error: Exception, *, is_dead: bool = False) -> errors.ApiError:
    """Return the client's error for any exception of vLLM. `is_dead`: whether the engine has died."""
    if isinstance(error, errors.ApiError):
        return error
    if isinstance(error, EngineDeadError) or is_dead:
        return unavailable()
    if isinstance(error, ChatTemplateResolutionError):
        return errors.BadRequest(
            "this base model has no chat template: request an adapter that has its own, or add chat_template.jinja to "
            "the base model's folder and restart the service",
            code=errors.Code.NO_CHAT_TEMPLATE,
            param="model",
        )
    return api_error(create_error_response(error))


def bad_request(error: Exception) -> errors.BadRequest:
    """Return the client's error for a body that vLLM's request models reject; it does not repeat values."""
    if not isinstance(error, ValidationError):  # vLLM's validators raise errors that pydantic does not wrap
        param = getattr(error, "parameter", None)
        is_slip = isinstance(error, _SLIPS)
        text = "a field has a value of the wrong type" if is_slip else _APPENDIX.sub("", str(error))
        return errors.BadRequest(text or "invalid request", code=errors.Code.INVALID_VALUE, param=param)
    by_field: dict[str, list[Any]] = {}
    for one in error.errors(include_input=False, include_url=False):
        by_field.setdefault(next(iter(_fields(one["loc"])), ""), []).append(one)
    problems = [_likeliest(some) for some in by_field.values()]
    params = [".".join(_fields(one["loc"])) or None for one in problems]
    told = [
        f"{param}: {in_words(one)}" if param else in_words(one)
        for param, one in zip(params, problems, strict=True)
    ]
    missing = all(one["type"] == "missing" for one in problems)
    return errors.BadRequest(
        "; ".join(told[:_MOST_PROBLEMS]),
        code=errors.Code.MISSING_REQUIRED_PARAMETER if missing else errors.Code.INVALID_VALUE,
        param=params[0],
    )


def _likeliest(problems: Sequence[Any]) -> Any:
    """Return the most likely problem of a value with a union type, for which pydantic reports one per alternative.

    Drops alternatives whose literal field (role or kind) does not match. Of the rest, prefers the problem of the
    deepest field, and there one that is neither a missing field nor a wrong type.
    """
    not_meant = [one["loc"][:-1] for one in problems if one["type"] == "literal_error"]
    meant = [one for one in problems if not any(one["loc"][: len(loc)] == loc for loc in not_meant)]
    return max(
        meant or [one for one in problems if one["type"] == "literal_error"] or problems,
        key=lambda one: (
            len(_fields(one["loc"])),
            one["type"] != "missing",
            not one["type"].endswith("_type"),
        ),
    )


def _fields(place: Sequence[int | str]) -> list[str]:
    """Return the field names on the path to a value, without pydantic's names of types."""
    parts = [str(part) for part in place]
    return [
        p for p in parts if p not in _TYPES and not p[:1].isupper() and not any(mark in p for mark in "[(-")
    ]


def api_error(response: ErrorResponse) -> errors.ApiError:
    """Return the client's error for an error body of vLLM."""
    error = response.error
    if error.code == HTTPStatus.NOT_FOUND:
        return _not_found(error)
    if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
        return errors.EngineUnavailable(error.message, param=error.param)
    if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return errors.EngineFailed(error.message or "the engine failed on this request", param=error.param)
    if "maximum context length" in error.message or "max_model_len" in error.message:
        # LangChain searches the text for the code.
        text = _APPENDIX.sub("", error.message)
        message = f"{text} (context_length_exceeded; `truncation: auto` leaves out the oldest turns)"
        return errors.BadRequest(message, code=errors.Code.CONTEXT_LENGTH_EXCEEDED, param=error.param)
    if "--tool-call-parser" in error.message or "--enable-auto-tool-choice" in error.message:
        return no_tool_parser()
    text = _APPENDIX.sub("", error.message)
    field = _FIELD.match(text)
    return errors.BadRequest(text, code=errors.Code.INVALID_VALUE, param=error.param or (field and field[1]))


def cannot_be_followed() -> errors.BadRequest:
    """Return the error for an answer that the engine aborted because it could not compile the requested grammar.

    vLLM's earlier check uses other rules, and its final error has no reason.
    """
    return errors.BadRequest(
        "the engine cannot make a grammar for this answer: the requested grammar, JSON schema, expression or "
        "structural tag is empty or refers to itself without end",
        code=errors.Code.INVALID_VALUE,
    )


def _not_found(error: ErrorInfo) -> errors.ApiError:
    if error.param != "response_id":  # vLLM's name for it, also in requests
        return errors.ModelNotFound(error.message, param=error.param)
    return errors.ResponseNotFound(
        "there is no such response: it was not stored, was evicted, or was deleted; send the conversation itself",
        code=errors.Code.PREVIOUS_RESPONSE_NOT_FOUND,
        param="previous_response_id",
    )


def no_tool_parser() -> errors.BadRequest:
    """Return the error for tools on a service without a tool-call parser."""
    return errors.BadRequest(_NO_PARSER, code=errors.Code.TOOLS_NOT_SUPPORTED, param="tools")
