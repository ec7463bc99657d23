"""The endpoints that an engine answers. app.exchange.steps has what becomes of a request."""

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
    """Calls a function of the request, and sends the response.

    Without what FastAPI does for other functions: their parameters and dependencies, of which these have none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.dependant.dependencies:
            raise TypeError(f"{self.path} has dependencies, and nobody would ask them")
        self.app = self._respond

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self.endpoint(AppRequest(scope, receive, send))
        await response(scope, receive, send)


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
_route(Endpoint.RESPONSES, "create_response", "Answer a conversation, stored if wanted (OpenAI)")
_route(Endpoint.MESSAGES, "create_message", "Answer a conversation (Anthropic)")
_route(Endpoint.COUNT_TOKENS, "count_tokens", "Count the tokens of a conversation (Anthropic)")
_route(Endpoint.TOKENIZE, "tokenize", "The tokens of a text or conversation (vLLM)")
_route(Endpoint.DETOKENIZE, "detokenize", "The text of tokens (vLLM)")


async def invocations(request: AppRequest) -> Response:
    """SageMaker's one route: a chat, a completion or a response, by what is in the body."""
    return await respond(request, None)


router.add_api_route(
    "/invocations",
    invocations,
    methods=["POST"],
    summary="A chat, a completion or a response, by what is in the body (SageMaker)",
    responses=_STREAMED | failures(*_FAILURES),
    route_class_override=_Direct,
)
