"""Probes of load balancers, routers and other tools that expect any model server."""

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.service import Service

MESSAGES = [{"role": "user", "content": "感冒有什么症状？"}]


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
def test_health_needs_no_key(service: Service, method: str, path: str) -> None:
    assert service.call(method, path, key=None) == (200, "")


def test_version_and_load(service: Service) -> None:
    status, reply = service.call("GET", "/version", key=None)
    assert (status, reply["version"].split(".")[:2]) == (200, ["0", "32"])
    assert service.call("GET", "/load", key=None) == (200, {"server_load": 0})


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"messages": MESSAGES}, "chat.completion"),
        ({"prompt": "感冒"}, "text_completion"),
        ({"input": "感冒"}, "response"),
    ],
)
def test_invocations_takes_all_bodies(service: Service, body: dict[str, Any], kind: str) -> None:
    status, reply = service.call("POST", "/invocations", {"model": "doctor", **body})
    assert (status, reply["object"]) == (200, kind)
    assert reply["model"] == "doctor"


def test_invocations_rejects_other_bodies(service: Service) -> None:
    status, reply = service.call("POST", "/invocations", {"model": "doctor"})
    assert (status, reply["error"]["code"]) == (400, "missing_required_parameter")


def raw(
    service: Service, method: str, path: str, body: Any = None, **headers: str
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, None if body is None else json.dumps(body), given)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


def test_an_adapter_named_by_a_header(service: Service) -> None:
    response = raw(
        service, "POST", "/invocations", {"messages": MESSAGES}, x_amzn_sagemaker_adapter_identifier="doctor"
    )
    assert response.status == 200
    assert response.headers["x-adapter-revision"]


def test_adapters_are_loaded_and_unloaded_as_sagemaker_does(service: Service) -> None:
    folder = next((service.data_dir / "store" / "leaflet" / "revisions").iterdir())
    assert service.call("POST", "/adapters", {"name": "sage", "src": str(folder)}, key=None)[0] == 401
    status, reply = service.call("POST", "/adapters", {"name": "sage", "src": str(folder), "pin": False})
    assert status == 200, reply
    assert service.answer("sage", "感冒有什么症状？") == service.answer("leaflet", "感冒有什么症状？")
    assert service.call("DELETE", "/adapters/sage")[0] == 200
    assert service.call("DELETE", "/adapters/sage")[0] == 404


def test_a_missing_folder_is_not_found_and_one_outside_is_forbidden(service: Service) -> None:
    for path, status, code in (
        (f"{service.data_dir}/nowhere", 404, "folder_not_found"),
        ("nowhere", 404, "folder_not_found"),
        ("/etc", 403, "path_not_allowed"),
        ("/nowhere", 403, "path_not_allowed"),
    ):
        found, reply = service.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path})
        assert (found, reply["error"]["code"]) == (status, code)
        assert str(service.data_dir) not in json.dumps(reply)


def test_the_clients_request_id_is_returned(service: Service) -> None:
    body = {"model": "doctor", "messages": MESSAGES, "max_tokens": 1}
    for path, given, status in (
        ("/v1/chat/completions", body, 200),
        ("/v1/chat/completions", {**body, "stream": True}, 200),
        ("/v1/chat/completions", {**body, "temperature": -1}, 400),
        ("/v1/messages", {**body, "model": "none"}, 404),
    ):
        response = raw(service, "POST", path, given, x_request_id="trace-4711")
        assert (response.status, response.headers["x-request-id"]) == (status, "trace-4711")
    for bad in ("", "x" * 129, "two words"):
        own = raw(service, "POST", "/v1/chat/completions", body, x_request_id=bad).headers["x-request-id"]
        assert len(own) == 32
    # Concurrent requests with one id do not interfere: the engine uses the service's own ids.
    long = {**body, "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(raw, service, "POST", "/v1/chat/completions", long, x_request_id="a")
            for _ in range(2)
        ]
        assert [one.result().status for one in asked] == [200, 200]


def test_other_origins_are_refused_by_default(service: Service) -> None:
    response = raw(service, "OPTIONS", "/v1/chat/completions", origin="https://app.example.org")
    assert response.status == 405
    assert "access-control-allow-origin" not in response.headers
