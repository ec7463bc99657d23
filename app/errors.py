"""Every error a client can see: the classes, the codes, and the table that maps one to the other.

ApiError
├── BadRequest            the request is invalid or cannot be carried out; `code` and `param` say why
├── Unauthorized          the key is missing or wrong
├── ModelNotFound         no served model has this name
├── ResponseNotFound      no stored response has this id (any more)
├── ImportNotFound        no import has this id (any more)
├── RouteNotFound         the path does not exist
├── MethodNotAllowed      the path does not support this method
├── PathNotAllowed        a folder or source that the operator does not allow
├── FolderNotFound        no such folder below the allowed roots
├── AdapterRefused        the engine or the service refused an adapter; the alias did not move
│   ├── ProofFailed       the live engine does not reproduce its golden prompts
│   └── Unproven          it has no golden prompts, and the operator requires them
├── AdapterUnavailable    the adapter exists but cannot answer at present
├── TooManyRequests       the limit of concurrent requests is reached
├── EngineUnavailable     the engine is starting or restarting
└── EngineFailed          the engine failed on this request

adapters.AdapterError and its subclasses reach clients through the same table.
"""

from enum import StrEnum
from typing import Any, NamedTuple

from adapters import (
    AdapterError,
    AdapterNotFound,
    AliasMoved,
    InvalidAdapter,
    InvalidRef,
    NothingToRollBack,
    StoreDamaged,
)


class Answer(NamedTuple):
    """The response to an error."""

    status: int
    meaning: str
    """One sentence for docs/en/errors.md."""
    retry_after: int | None = None
    """In seconds; None if a retry cannot help."""


class Code(StrEnum):
    """The error codes that clients read; docs/en/errors.md lists them."""

    answer: Answer

    def __new__(cls, value: str, *answer: Any) -> "Code":
        """Create a member that equals its code and keeps the other values as `answer`."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.answer = Answer(*answer)
        return member

    INVALID_REQUEST = "invalid_request", 400, "The request cannot be carried out."
    INVALID_JSON = "invalid_json", 400, "The body is not a JSON object."
    INVALID_MULTIPART = "invalid_multipart", 400, "The upload is not a readable multipart body."
    INVALID_VALUE = "invalid_value", 400, "A parameter has an invalid value; `param` names it."
    MISSING_REQUIRED_PARAMETER = (
        "missing_required_parameter",
        400,
        "A required parameter is missing; `param` names it.",
    )
    REQUEST_TOO_LARGE = "request_too_large", 400, "The body exceeds the size limit."
    REQUEST_TIMEOUT = "request_timeout", 400, "The body took too long to arrive."
    CONTEXT_LENGTH_EXCEEDED = (
        "context_length_exceeded", 400, "The prompt and the answer do not fit into the model's context.",
    )  # fmt: skip
    NO_CHAT_TEMPLATE = (
        "no_chat_template",
        400,
        "Neither the base model nor the adapter has a chat template.",
    )
    CHAT_TEMPLATE_FAILED = "chat_template_failed", 400, "The chat template cannot render this conversation."
    TOOLS_NOT_SUPPORTED = (
        "tools_not_supported",
        400,
        "The base model is served without a tool call parser.",
    )
    INVALID_SOURCE = "invalid_source", 400, "The source is not a valid URI of a supported kind."
    INVALID_REF = "invalid_ref", 400, "The text is not a valid adapter name, alias or revision."
    INVALID_ADAPTER = "invalid_adapter", 400, "The adapter is invalid; `problems` lists every fault."
    ADAPTER_REFUSED = (
        "adapter_refused",
        400,
        "The engine or the service refused the adapter; the alias did not move.",
    )
    PROOF_FAILED = "proof_failed", 400, "The live engine does not reproduce the adapter's golden prompts."
    UNPROVEN = "unproven", 400, "The adapter has no golden prompts, and the service requires them."
    NOTHING_TO_ROLL_BACK = "nothing_to_roll_back", 400, "The alias has no previous revision."
    INVALID_API_KEY = "invalid_api_key", 401, "The key is missing or wrong."
    PATH_NOT_ALLOWED = "path_not_allowed", 403, "The operator does not allow this folder or source."
    NOT_FOUND = "not_found", 404, "The path does not exist."
    MODEL_NOT_FOUND = "model_not_found", 404, "No served model has this name."
    ADAPTER_NOT_FOUND = "adapter_not_found", 404, "The store has no such adapter, alias or revision."
    FOLDER_NOT_FOUND = (
        "folder_not_found",
        404,
        "The folder does not exist below the allowed roots.",
    )
    IMPORT_NOT_FOUND = "import_not_found", 404, "The import does not exist or is no longer kept."
    RESPONSE_NOT_FOUND = "response_not_found", 404, "The response does not exist or is no longer stored."
    PREVIOUS_RESPONSE_NOT_FOUND = (
        "previous_response_not_found", 404, "The response to continue from does not exist or is no longer stored.",
    )  # fmt: skip
    METHOD_NOT_ALLOWED = "method_not_allowed", 405, "The path does not support this method."
    ALIAS_MOVED = "alias_moved", 409, "Another request or process moved the alias meanwhile.", 1
    TOO_MANY_REQUESTS = "too_many_requests", 429, "The limit of concurrent requests is reached.", 1
    ENGINE_FAILED = "engine_failed", 500, "The engine or the service failed on this request."
    STORE_DAMAGED = (
        "store_damaged",
        500,
        "A file in the store is unreadable or was changed after it was published.",
    )
    ADAPTER_UNAVAILABLE = "adapter_unavailable", 503, "The adapter exists but cannot answer at present.", 1
    ENGINE_UNAVAILABLE = "engine_unavailable", 503, "The engine is starting or restarting.", 5


class ApiError(Exception):
    """Base class of these errors. The client reads the message unchanged."""

    def __init__(self, message: str, *, code: Code | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class BadRequest(ApiError):
    """The request is invalid or cannot be carried out."""


class Unauthorized(ApiError):
    """The key is missing or wrong."""


class ModelNotFound(ApiError):
    """No served model has this name."""


class ResponseNotFound(ApiError):
    """No stored response has this id (any more)."""


class ImportNotFound(ApiError):
    """No import has this id (any more)."""


class RouteNotFound(ApiError):
    """The path does not exist."""


class MethodNotAllowed(ApiError):
    """The path does not support this method."""


class PathNotAllowed(ApiError):
    """The operator does not allow this folder or source."""


class FolderNotFound(ApiError):
    """The folder does not exist below the allowed roots."""


class AdapterRefused(ApiError):
    """The engine or the service refused an adapter; the alias did not move."""


class ProofFailed(AdapterRefused):
    """The live engine does not reproduce the adapter's golden prompts."""


class Unproven(AdapterRefused):
    """The adapter has no golden prompts, and the operator requires them."""


class AdapterUnavailable(ApiError):
    """The adapter exists but cannot answer at present."""


class TooManyRequests(ApiError):
    """The limit of concurrent requests is reached."""


class EngineUnavailable(ApiError):
    """The engine is starting or restarting."""


class EngineFailed(ApiError):
    """The engine failed on this request."""


TABLE: dict[type[Exception], Code] = {
    BadRequest: Code.INVALID_REQUEST,
    Unauthorized: Code.INVALID_API_KEY,
    ModelNotFound: Code.MODEL_NOT_FOUND,
    ResponseNotFound: Code.RESPONSE_NOT_FOUND,
    ImportNotFound: Code.IMPORT_NOT_FOUND,
    RouteNotFound: Code.NOT_FOUND,
    MethodNotAllowed: Code.METHOD_NOT_ALLOWED,
    PathNotAllowed: Code.PATH_NOT_ALLOWED,
    FolderNotFound: Code.FOLDER_NOT_FOUND,
    AdapterRefused: Code.ADAPTER_REFUSED,
    ProofFailed: Code.PROOF_FAILED,
    Unproven: Code.UNPROVEN,
    AdapterUnavailable: Code.ADAPTER_UNAVAILABLE,
    TooManyRequests: Code.TOO_MANY_REQUESTS,
    EngineUnavailable: Code.ENGINE_UNAVAILABLE,
    EngineFailed: Code.ENGINE_FAILED,
    InvalidRef: Code.INVALID_REF,
    InvalidAdapter: Code.INVALID_ADAPTER,
    AdapterNotFound: Code.ADAPTER_NOT_FOUND,
    AliasMoved: Code.ALIAS_MOVED,
    NothingToRollBack: Code.NOTHING_TO_ROLL_BACK,
    StoreDamaged: Code.STORE_DAMAGED,
    AdapterError: Code.INVALID_ADAPTER,
}
"""The code of an error that has none of its own."""

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""OpenAI's error types by status; all others are `invalid_request_error`."""


def code_of(error: Exception) -> Code:
    """Return the error's own code, or that of its nearest class in the table."""
    if isinstance(error, ApiError) and error.code:
        return error.code
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def status_of(error: BaseException) -> int:
    """Return the status under which a request that ended with `error` is counted; 499 if it was cancelled."""
    if isinstance(error, ApiError | AdapterError):
        return code_of(error).answer.status
    return 500 if isinstance(error, Exception) else 499


def body(error: Exception) -> dict[str, Any]:
    """Return OpenAI's error object, with the `problems` of an invalid adapter."""
    code = code_of(error)
    detail: dict[str, Any] = {
        "message": str(error),
        "type": _TYPES.get(code.answer.status, "invalid_request_error"),
        "param": error.param if isinstance(error, ApiError) else None,
        "code": code,
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
    """Return Anthropic's error object (its API reference, "Errors") with our code added."""
    of_openai = body(error)["error"]
    kind = _ANTHROPIC_TYPES.get(code_of(error).answer.status, "api_error")
    # OpenAI's clients read `code`, Anthropic's read `details`.
    code = of_openai["code"]
    detail = {"type": kind, "message": of_openai["message"], "code": code, "details": {"error_code": code}}
    return {"type": "error", "error": detail}


def headers(error: Exception) -> dict[str, str]:
    """Return the retry headers. OpenAI's clients obey both."""
    seconds = code_of(error).answer.retry_after
    if seconds is None:
        return {"x-should-retry": "false"}
    return {"retry-after": str(seconds)}
