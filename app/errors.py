"""Every error a client can see: the tree, the codes, and the one table that joins them.

ApiError
├── BadRequest            the request cannot be understood or carried out; `code` and `param` say where
├── Unauthorized          no key, or a wrong one
├── ModelNotFound         no served model of that name
├── ResponseNotFound      no stored response of that id (any more)
├── ImportNotFound        no import of that id (any more)
├── RouteNotFound         no such path
├── MethodNotAllowed      the path does not take this method
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
    """How an error is answered."""

    status: int
    meaning: str
    """One sentence for docs/errors.md."""
    retry_after: int | None = None
    """In seconds; None when trying again as it is cannot help."""


class Code(StrEnum):
    """The code of an error, by which clients tell one from another; docs/errors.md lists them."""

    answer: Answer

    def __new__(cls, value: str, *answer: Any) -> "Code":
        """A member is its value, and has the rest as `answer`."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.answer = Answer(*answer)
        return member

    INVALID_REQUEST = "invalid_request", 400, "The request cannot be carried out."
    INVALID_JSON = "invalid_json", 400, "The body is not a JSON object."
    INVALID_MULTIPART = "invalid_multipart", 400, "The upload is not a readable multipart body."
    INVALID_VALUE = "invalid_value", 400, "A parameter has a value that it may not have; `param` names it."
    MISSING_REQUIRED_PARAMETER = (
        "missing_required_parameter",
        400,
        "`param` names the parameter that is missing.",
    )
    REQUEST_TOO_LARGE = "request_too_large", 400, "The body is larger than the service takes."
    REQUEST_TIMEOUT = "request_timeout", 400, "The body took too long to arrive."
    CONTEXT_LENGTH_EXCEEDED = (
        "context_length_exceeded", 400, "Prompt and answer do not fit into the model's context.",
    )  # fmt: skip
    NO_CHAT_TEMPLATE = (
        "no_chat_template",
        400,
        "The base model has no chat template, and the adapter brings none.",
    )
    CHAT_TEMPLATE_FAILED = "chat_template_failed", 400, "The chat template cannot render this conversation."
    TOOLS_NOT_SUPPORTED = (
        "tools_not_supported",
        400,
        "The service was started without a parser of tool calls.",
    )
    INVALID_SOURCE = "invalid_source", 400, "The source is not a URI that can be fetched, or is not allowed."
    INVALID_REF = "invalid_ref", 400, "The text is not a name, alias or revision."
    INVALID_ADAPTER = "invalid_adapter", 400, "The adapter has faults; `problems` lists all of them."
    ADAPTER_REFUSED = (
        "adapter_refused",
        400,
        "The engine or the service refused the adapter; the alias did not move.",
    )
    PROOF_FAILED = "proof_failed", 400, "The live engine does not reproduce the adapter's golden prompts."
    UNPROVEN = "unproven", 400, "The adapter brings no golden prompts, and the service does not allow that."
    NOTHING_TO_ROLL_BACK = "nothing_to_roll_back", 400, "The alias has no previous revision."
    INVALID_API_KEY = "invalid_api_key", 401, "The key is missing or wrong."
    PATH_NOT_ALLOWED = "path_not_allowed", 403, "The folder is outside the roots that the service may read."
    NOT_FOUND = "not_found", 404, "There is no such path."
    MODEL_NOT_FOUND = "model_not_found", 404, "No model of that name is served."
    ADAPTER_NOT_FOUND = "adapter_not_found", 404, "The store has no such adapter, alias or revision."
    FOLDER_NOT_FOUND = (
        "folder_not_found",
        404,
        "There is no such folder below the roots that the service may read.",
    )
    IMPORT_NOT_FOUND = "import_not_found", 404, "There is no import of that id, or not any more."
    RESPONSE_NOT_FOUND = "response_not_found", 404, "There is no stored response of that id, or not any more."
    PREVIOUS_RESPONSE_NOT_FOUND = (
        "previous_response_not_found", 404, "The response to continue from is not stored, or not any more.",
    )  # fmt: skip
    METHOD_NOT_ALLOWED = "method_not_allowed", 405, "The path does not take this method."
    ALIAS_MOVED = "alias_moved", 409, "Somebody else moved the alias meanwhile.", 1
    TOO_MANY_REQUESTS = "too_many_requests", 429, "The service is answering as many requests as it may.", 1
    ENGINE_FAILED = "engine_failed", 500, "The engine or the service failed on this request."
    STORE_DAMAGED = (
        "store_damaged",
        500,
        "The store holds a revision that was changed after it was published.",
    )
    ADAPTER_UNAVAILABLE = "adapter_unavailable", 503, "The adapter is known, and cannot answer at present.", 1
    ENGINE_UNAVAILABLE = "engine_unavailable", 503, "The engine is starting, or restarting after it died.", 5


class ApiError(Exception):
    """Base of the tree. The message goes to the client as it is."""

    def __init__(self, message: str, *, code: Code | None = None, param: str | None = None) -> None:
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


class ImportNotFound(ApiError):
    """No import of that id (any more)."""


class RouteNotFound(ApiError):
    """No such path."""


class MethodNotAllowed(ApiError):
    """The path does not take this method."""


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
"""The code of an error that brings none of its own."""

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""OpenAI's types; all else is the client's to mend."""


def code_of(error: Exception) -> Code:
    """The error's own code, or that of its nearest class in the table."""
    if isinstance(error, ApiError) and error.code:
        return error.code
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def status_of(error: BaseException) -> int:
    """The status that a request which ends with `error` is counted by; 499 if it was given up."""
    if isinstance(error, ApiError | AdapterError):
        return code_of(error).answer.status
    return 500 if isinstance(error, Exception) else 499


def body(error: Exception) -> dict[str, Any]:
    """What the client reads: OpenAI's error object, and the single problems of a refused adapter."""
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
    """What Anthropic's clients read (its API reference, "Errors"); our code beside it."""
    of_openai = body(error)["error"]
    kind = _ANTHROPIC_TYPES.get(code_of(error).answer.status, "api_error")
    # `code` is where OpenAI's clients look for it, and `details` where Anthropic's do.
    code = of_openai["code"]
    detail = {"type": kind, "message": of_openai["message"], "code": code, "details": {"error_code": code}}
    return {"type": "error", "error": detail}


def headers(error: Exception) -> dict[str, str]:
    """OpenAI's clients obey both: when to try again, and whether to."""
    seconds = code_of(error).answer.retry_after
    if seconds is None:
        return {"x-should-retry": "false"}
    return {"retry-after": str(seconds)}
