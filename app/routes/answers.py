"""The endpoints that an engine answers. See app.exchange.steps for the life of a request."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from app.engine.base import Endpoint
from app.exchange.state import AppRequest
from app.exchange.steps import respond
from app.routes.examples import request_body
from app.routes.openapi import AnthropicErrorBody, ErrorBody, failures

router = APIRouter()


class _Direct(APIRoute):
    """A route that calls its endpoint with the request alone and sends the response.

    It skips FastAPI's parameters and dependencies, since these endpoints have none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.dependant.dependencies:
            raise TypeError(f"{self.path} has dependencies, which this route would ignore")
        self.app = self._respond

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(AppRequest(scope, receive, send))
        await response(scope, receive, send)


_FAILURES = (400, 401, 404, 429, 500, 503)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One JSON object, or with `stream` server-sent events",
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
    async def create(request: AppRequest) -> Response:
        return await respond(request, endpoint)

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
_route(Endpoint.RESPONSES, "create_response", "Answer a conversation, stored if requested (OpenAI)")
_route(Endpoint.MESSAGES, "create_message", "Answer a conversation (Anthropic)")
_route(Endpoint.COUNT_TOKENS, "count_tokens", "Count the tokens of a conversation (Anthropic)")
_route(Endpoint.TOKENIZE, "tokenize", "Tokenize a text or conversation (vLLM)")
_route(Endpoint.DETOKENIZE, "detokenize", "Turn tokens into text (vLLM)")


async def invocations(request: AppRequest) -> Response:
    """SageMaker's single route: the body's fields decide between chat, completion and response."""
    return await respond(request, None)


router.add_api_route(
    "/invocations",
    invocations,
    methods=["POST"],
    summary="Chat, completion or response, depending on the body (SageMaker)",
    responses=_STREAMED | failures(*_FAILURES),
    route_class_override=_Direct,
)
