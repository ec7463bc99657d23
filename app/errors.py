"""Every error a client can see: the tree, and the one table that turns it into an OpenAI-shaped body.

ApiError
├── BadRequest            the request cannot be understood or carried out; `code` and `param` say where
├── Unauthorized          no key, or a wrong one
├── ModelNotFound         no served model of that name
├── ResponseNotFound      no stored response of that id (any more)
├── PathNotAllowed        a folder outside the allow-listed roots
├── FolderNotFound        no folder of that name inside them
├── AdapterRefused        the engine or the proof turned an adapter down; the alias did not move
│   ├── ProofFailed       ... because the live engine does not reproduce its golden prompts
│   └── Unproven          ... because it brings none, and the operator does not allow that
├── AdapterUnavailable    the alias exists, but nothing proven stands behind it (yet)
├── TooManyRequests       above the limit of concurrent requests
├── EngineUnavailable     starting, or being rebuilt after it died
└── EngineFailed          the engine failed on this request

adapters.AdapterError and its subclasses reach clients through the same table.
"""

from dataclasses import dataclass
from typing import Any

from adapters import (
    AdapterError,
    AdapterNotFound,
    AliasMoved,
    InvalidAdapter,
    InvalidRef,
    NothingToRollBack,
    StoreDamaged,
)


class ApiError(Exception):
    """Base of the tree. The message goes to the client as it is."""

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class BadRequest(ApiError):
    """The request cannot be understood or carried out."""


class Unauthorized(ApiError):
    """No key, or a wrong one."""


class ModelNotFound(ApiError):
    """No served model of that name."""


class ResponseNotFound(ApiError):
    """No stored response of that id (any more)."""


class PathNotAllowed(ApiError):
    """A folder outside the allow-listed roots."""


class FolderNotFound(ApiError):
    """No folder of that name inside the allow-listed roots."""


class AdapterRefused(ApiError):
    """The engine or the proof turned an adapter down; the alias did not move."""


class ProofFailed(AdapterRefused):
    """The live engine does not reproduce its golden prompts."""


class Unproven(AdapterRefused):
    """It brings no golden prompts, and the operator does not allow that."""


class AdapterUnavailable(ApiError):
    """The alias exists, but nothing proven stands behind it (yet)."""


class TooManyRequests(ApiError):
    """Above the limit of concurrent requests."""


class EngineUnavailable(ApiError):
    """Starting, or being rebuilt after it died."""


class EngineFailed(ApiError):
    """The engine failed on this request."""


@dataclass(frozen=True)
class Row:
    """One row of the table. `retry_after` is in seconds; None when trying again as it is cannot help."""

    status: int
    type: str
    code: str
    retry_after: int | None = None


_INVALID = "invalid_request_error"

TABLE: dict[type[Exception], Row] = {
    BadRequest: Row(400, _INVALID, "invalid_request"),
    Unauthorized: Row(401, _INVALID, "invalid_api_key"),
    ModelNotFound: Row(404, _INVALID, "model_not_found"),
    ResponseNotFound: Row(404, _INVALID, "response_not_found"),
    PathNotAllowed: Row(403, _INVALID, "path_not_allowed"),
    FolderNotFound: Row(404, _INVALID, "folder_not_found"),
    AdapterRefused: Row(400, _INVALID, "adapter_refused"),
    ProofFailed: Row(400, _INVALID, "proof_failed"),
    Unproven: Row(400, _INVALID, "unproven"),
    AdapterUnavailable: Row(503, "server_error", "adapter_unavailable", retry_after=1),
    TooManyRequests: Row(429, "rate_limit_error", "too_many_requests", retry_after=1),
    EngineUnavailable: Row(503, "server_error", "engine_unavailable", retry_after=5),
    EngineFailed: Row(500, "server_error", "engine_failed"),
    InvalidRef: Row(400, _INVALID, "invalid_ref"),
    InvalidAdapter: Row(400, _INVALID, "invalid_adapter"),
    AdapterNotFound: Row(404, _INVALID, "adapter_not_found"),
    AliasMoved: Row(409, _INVALID, "alias_moved", retry_after=1),
    NothingToRollBack: Row(400, _INVALID, "nothing_to_roll_back"),
    StoreDamaged: Row(500, "server_error", "store_damaged"),
    AdapterError: Row(400, _INVALID, "invalid_adapter"),
}


def row(error: Exception) -> Row:
    """The row of `error`'s class, or of its nearest base class in the table."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def status_of(error: BaseException) -> int:
    """The status that a request which ends with `error` is counted by; 499 if it was given up."""
    if isinstance(error, ApiError | AdapterError):
        return row(error).status
    return 500 if isinstance(error, Exception) else 499


def body(error: Exception) -> dict[str, Any]:
    """What the client reads: OpenAI's error object, and the single problems of a refused adapter."""
    detail: dict[str, Any] = {
        "message": str(error),
        "type": row(error).type,
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None) or row(error).code,
    }
    if isinstance(error, InvalidAdapter):
        detail["problems"] = error.problems
    return {"error": detail}


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_body(error: Exception) -> dict[str, Any]:
    """What Anthropic's clients read (its API reference, "Errors"); our code beside it."""
    of_openai = body(error)["error"]
    kind = _ANTHROPIC_TYPES.get(row(error).status, "api_error")
    # `code` is where OpenAI's clients look for it, and `details` where Anthropic's do.
    code = of_openai["code"]
    detail = {"type": kind, "message": of_openai["message"], "code": code, "details": {"error_code": code}}
    return {"type": "error", "error": detail}


def headers(error: Exception) -> dict[str, str]:
    """OpenAI's clients obey both: when to try again, and whether to."""
    seconds = row(error).retry_after
    if seconds is None:
        return {"x-should-retry": "false"}
    return {"retry-after": str(seconds)}
