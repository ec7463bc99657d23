"""/openapi.json, from which clients are generated and which /docs shows."""

from typing import Any

import pytest

from app.engine.base import Endpoint
from app.main import create_app
from app.settings import Settings


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def schema(page: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    (content,) = response["content"].values()
    return page["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]


def test_no_route_documents_a_422(page: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in page["components"]["schemas"]
    for path, methods in page["paths"].items():
        for of_method in methods.values():
            assert "422" not in of_method["responses"], path


@pytest.mark.parametrize("endpoint", Endpoint)
def test_endpoints_of_an_engine_document_their_errors(page: dict[str, Any], endpoint: Endpoint) -> None:
    responses = page["paths"][endpoint]["post"]["responses"]
    assert {"200", "400", "401", "404", "429", "500", "503"} <= responses.keys()
    streams = endpoint not in (
        Endpoint.CHAT_BATCH,
        Endpoint.COUNT_TOKENS,
        Endpoint.TOKENIZE,
        Endpoint.DETOKENIZE,
    )
    assert ("text/event-stream" in responses["200"]["content"]) == streams
    assert "model_not_found" in responses["404"]["description"]
    error = schema(page, responses["429"])["properties"]["error"]["$ref"]
    assert error.endswith("AnthropicErrorDetail" if "messages" in endpoint else "/ErrorDetail")


@pytest.mark.parametrize("method", ["put", "delete"])
def test_operator_routes_document_their_errors(page: dict[str, Any], method: str) -> None:
    responses = page["paths"]["/v1/adapters/{name}/aliases/{alias}"][method]["responses"]
    assert {"400", "401", "404", "409", "503"} <= responses.keys()
    assert "proof_failed" in responses["400"]["description"]


def test_metrics_are_text(page: dict[str, Any]) -> None:
    assert [*page["paths"]["/metrics"]["get"]["responses"]["200"]["content"]] == ["text/plain"]
