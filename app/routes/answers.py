"""The endpoints that an engine answers: access and admission, lease, engine, stream.

Every request ends in exactly one of: a whole reply, a finish chunk and [DONE], an error body or event, or
an abort in the engine because the client left.
"""

import asyncio
import json
import logging
import time
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from adapters import AdapterError
from app.engine.base import Answer, Endpoint
from app.errors import ApiError, BadRequest, ModelNotFound, row
from app.exchange.connection import ClientLeft, WhileConnected, own_id
from app.exchange.event_stream import CLIENT_LEFT, EventStream
from app.exchange.shadow import Original
from app.lifecycle.bases import Base
from app.lifecycle.residency import Lease
from app.lifecycle.served_models import Choice
from app.metrics import Meter
from app.routes.examples import request_body
from app.routes.openapi import AnthropicErrorBody, ErrorBody, failures
from app.vllm_metrics import LOAD_FORMAT, load_header

logger = logging.getLogger(__name__)

router = APIRouter()

MAX_BODY_BYTES = 4 << 20  # parsing blocks everybody; the longest contexts are below this
BODY_SECONDS = 60


class _Direct(APIRoute):
    """Calls a function of the request, and sends the response.

    Without what FastAPI does for other functions: their parameters and dependencies, of which these have none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.dependant.dependencies:
            raise TypeError(f"{self.path} has dependencies, and nobody would ask them")
        self.app = self._respond

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


_BY_FIELD = {"messages": Endpoint.CHAT, "prompt": Endpoint.COMPLETIONS, "input": Endpoint.RESPONSES}
_SAGEMAKERS_ADAPTER = "x-amzn-sagemaker-adapter-identifier"


_FAILURES = (400, 401, 404, 429, 500, 503)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Whole, or with `stream` as server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def _responses(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    failing = failures(
        *_FAILURES, model=AnthropicErrorBody if endpoint.startswith(Endpoint.MESSAGES) else ErrorBody
    )
    streams = endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES)
    return _STREAMED | failing if streams else failing


def _route(endpoint: Endpoint, name: str, summary: str) -> None:
    async def create(request: Request) -> Response:
        request.state.access.require_chat(request)
        return await _respond(request, endpoint)

    create.__name__ = name
    router.add_api_route(
        endpoint,
        create,
        methods=["POST"],
        summary=summary,
        responses=_responses(endpoint),
        openapi_extra=request_body(endpoint),
        route_class_override=_Direct,
    )


_route(Endpoint.CHAT, "create_chat_completion", "Answer a conversation (OpenAI)")
_route(Endpoint.CHAT_BATCH, "create_chat_completions", "Answer several conversations at once (vLLM)")
_route(Endpoint.COMPLETIONS, "create_completion", "Continue texts (OpenAI)")
_route(Endpoint.RESPONSES, "create_response", "Answer a conversation, stored if wanted (OpenAI)")
_route(Endpoint.MESSAGES, "create_message", "Answer a conversation (Anthropic)")
_route(Endpoint.COUNT_TOKENS, "count_tokens", "Count the tokens of a conversation (Anthropic)")
_route(Endpoint.TOKENIZE, "tokenize", "The tokens of a text or conversation (vLLM)")
_route(Endpoint.DETOKENIZE, "detokenize", "The text of tokens (vLLM)")


async def invocations(request: Request) -> Response:
    """SageMaker's one route: a chat, a completion or a response, by what is in the body."""
    request.state.access.require_chat(request)
    return await _respond(request, None)


router.add_api_route(
    "/invocations",
    invocations,
    methods=["POST"],
    summary="A chat, a completion or a response, by what is in the body (SageMaker)",
    responses=_STREAMED | failures(*_FAILURES),
    route_class_override=_Direct,
)


async def _respond(request: Request, endpoint: Endpoint | None) -> Response:
    state = request.state
    started = time.perf_counter()
    meter = Meter(state.metrics, "unknown", "unknown", started)  # a label is never what a client made up
    status = CLIENT_LEFT
    goes_on = False  # and is counted when it has ended
    try:
        with ExitStack() as held:
            held.enter_context(state.admission.place())
            body = await _body_in_time(request)
            endpoint = endpoint or _meant(body)
            state.bases.check_ready()
            choice = await _choose(request, body)
            base = state.bases.of(choice.manifest) if choice.manifest else state.bases.named(choice.base)
            base.supervisor.check_ready()
            meter = _meter(request, choice, started)
            request_id = own_id(request)
            async with WhileConnected(request.receive):
                answer = await _answer(base, endpoint, body, choice, request_id, meter, held)
            headers = _headers(request, base, choice, answer)
            reply, rest = answer.reply, answer.rest
            if rest is not None:
                goes_on = True
                until_then = held.pop_all()
                until_then.callback(meter.end, 200, is_stream=not isinstance(reply, dict))
                rest.add_done_callback(lambda _: until_then.close())
            copy = _copy_for_shadow(endpoint, request_id, body, choice, started)
            if isinstance(reply, dict):
                status = 200
                if copy:
                    copy.reply = reply
                    state.shadow.offer(copy)
                return JSONResponse(reply, headers=headers)
            goes_on = True

            def finish(status: int) -> None:
                if rest is None:
                    meter.end(status, is_stream=True)
                if copy and status == 200:
                    state.shadow.offer(copy)

            return EventStream(
                reply, held.pop_all(), headers, on_end=finish, keep=copy.events if copy else None
            )
    except (ClientLeft, ClientDisconnect):
        return Response(status_code=CLIENT_LEFT)
    except Exception as error:
        status = row(error).status if isinstance(error, ApiError | AdapterError) else 500
        raise
    finally:
        if not goes_on:
            meter.end(status, is_stream=False)


def _meant(body: dict[str, Any]) -> Endpoint:
    for field, endpoint in _BY_FIELD.items():
        if field in body:
            return endpoint
    raise BadRequest(
        "one of messages, prompt and input is required",
        code="missing_required_parameter",
        param="messages",
    )


async def _choose(request: Request, body: dict[str, Any]) -> Choice:
    user = body.get("user")
    session = request.headers.get("x-session-id") or (user if isinstance(user, str) else None)
    try:
        choice: Choice = request.state.served_models.choose(body["model"], session)
    except ModelNotFound:
        manifest = await request.state.operations.published(body["model"])
        if manifest is None:
            raise
        return Choice(manifest)
    return choice


def _meter(request: Request, choice: Choice, started: float) -> Meter:
    if choice.manifest is None:
        return Meter(request.state.metrics, str(choice.base), "base", started)
    return Meter(request.state.metrics, choice.manifest.name, choice.manifest.revision, started)


async def _answer(
    base: Base,
    endpoint: Endpoint,
    body: dict[str, Any],
    choice: Choice,
    request_id: str,
    meter: Meter,
    held: ExitStack,
) -> Answer:
    """Lease what was chosen, which may take a turn in a queue and a load, and ask it."""
    lease: Lease = held.enter_context(await base.residency.lease(choice.manifest))
    manifest = lease.manifest
    return await lease.engine.answer(
        endpoint,
        body,
        request_id=request_id,
        adapter=lease.adapter,
        fingerprint=manifest.ref if manifest else base.fingerprint,
        on_tokens=meter.on_tokens,
    )


def _headers(request: Request, base: Base, choice: Choice, answer: Answer) -> dict[str, str]:
    headers = {}
    if choice.manifest:
        headers["x-adapter-revision"] = choice.manifest.revision
    if answer.cut:
        headers["x-truncated"] = f"messages={answer.cut.messages}; tokens={answer.cut.tokens}"
    if (asked := request.headers.get(LOAD_FORMAT)) and base.supervisor.is_ready:
        headers |= load_header(base.supervisor.engine.stats, asked)
    return headers


def _copy_for_shadow(
    endpoint: Endpoint, request_id: str, body: dict[str, Any], choice: Choice, started: float
) -> Original | None:
    if endpoint is not Endpoint.CHAT:
        return None  # a shadow is asked what its users ask
    if choice.manifest is None or choice.shadow is None or choice.shadow == choice.manifest:
        return None
    return Original(request_id, body, choice.manifest, choice.shadow, started)


async def _body_in_time(request: Request) -> dict[str, Any]:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _body(request)
    except TimeoutError as error:
        raise BadRequest(
            f"the request took longer than {BODY_SECONDS} s to arrive", code="request_timeout"
        ) from error


async def _body(request: Request) -> dict[str, Any]:
    """The JSON body, as far as this service must know it; the engine checks the rest."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise BadRequest(
                f"the request is larger than {MAX_BODY_BYTES >> 20} MiB", code="request_too_large"
            )
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request body is not JSON", code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_json")
    if adapter := request.headers.get(_SAGEMAKERS_ADAPTER):
        body["model"] = adapter
    if "model" not in body:  # nobody should be answered by weights they did not name
        raise BadRequest(
            "model: this parameter is required", code="missing_required_parameter", param="model"
        )
    if not isinstance(body["model"], str):
        raise BadRequest("model: must be a string", code="invalid_value", param="model")
    return body
