"""Error responses: one place for our errors, FastAPI's and Starlette's."""

from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapters import AdapterError
from adapters.wording import in_words
from app import errors
from app.engine.base import Endpoint
from app.errors import Code
from app.exchange.connection import request_id_headers

_MOST_PROBLEMS = 5
"""Problems shown for one request."""


def answer_for(app: FastAPI) -> None:
    """Register these responses for every error of the app."""
    for kind in (errors.ApiError, AdapterError):
        app.add_exception_handler(kind, _error_response)
    app.add_exception_handler(RequestValidationError, _validation_response)
    app.add_exception_handler(HTTPException, _http_response)
    app.add_exception_handler(Exception, _unexpected_response)


def _error_response(request: Request, error: Exception) -> JSONResponse:
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    body = errors.anthropic_body if path.startswith(Endpoint.MESSAGES) else errors.body
    headers = {**errors.headers(error), **request_id_headers(request)}
    return JSONResponse(body(error), errors.status_of(error), headers)


def _validation_response(request: Request, error: Exception) -> JSONResponse:
    """Return FastAPI's list of problems as one OpenAI error, without the offending values."""
    problems = cast(RequestValidationError, error).errors()
    codes = {"json_invalid": Code.INVALID_JSON, "missing": Code.MISSING_REQUIRED_PARAMETER}
    shown = [
        f"{where}: {in_words(problem)}" if (where := _param(problem)) else in_words(problem)
        for problem in problems[:_MOST_PROBLEMS]
    ]
    code = codes.get(problems[0]["type"], Code.INVALID_VALUE)
    return _error_response(request, errors.BadRequest("; ".join(shown), code=code, param=_param(problems[0])))


def _param(problem: Mapping[str, Any]) -> str | None:
    return ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path")) or None


def _http_response(request: Request, error: Exception) -> JSONResponse:
    """Answer Starlette's own 404 and 405."""
    error = cast(HTTPException, error)
    kinds = {404: errors.RouteNotFound, 405: errors.MethodNotAllowed}
    kind = kinds.get(error.status_code, errors.BadRequest)
    response = _error_response(request, kind(f"{error.detail}: GET /docs lists all routes"))
    response.headers.update(error.headers or {})
    return response


def _unexpected_response(request: Request, error: Exception) -> JSONResponse:
    """Answer a defect of ours as a server error. Starlette logs the traceback."""
    return _error_response(request, errors.EngineFailed("internal error: see the service's log"))
