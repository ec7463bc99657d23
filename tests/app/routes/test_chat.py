"""Chat through the official client: models, responses, streams and errors."""

import http.client
import json
import re
from typing import Any

import openai
import pytest

from tests.service import Service

QUESTION = "感冒有什么症状？"
MODELS = ["xinglin-demo", "doctor", "doctor-ppo", "leaflet"]


def ask(model: str = "doctor", **options: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **options}


def test_models_list_the_base_and_its_adapters(service: Service) -> None:
    models = {model.id: model for model in service.client().models.list()}
    assert list(models) == MODELS
    assert models["xinglin-demo"].model_extra["parent"] is None
    for name in ("doctor", "doctor-ppo", "leaflet"):
        assert models[name].model_extra["parent"] == "xinglin-demo"
        assert models[name].model_extra["max_model_len"] == 1024


@pytest.mark.parametrize("name", ["xinglin-demo", "doctor", "doctor@default"])
def test_show_one_model(service: Service, name: str) -> None:
    assert service.client().models.retrieve(name).id == name


def test_no_host_path_in_any_card(service: Service) -> None:
    _, body = service.call("GET", "/v1/models")
    assert str(service.data_dir) not in json.dumps(body)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_matches_the_whole_response(service: Service, model: str) -> None:
    client = service.client()
    reply = client.chat.completions.create(**ask(model))
    chunks = list(
        client.chat.completions.create(**ask(model), stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == reply.choices[0].message.content
    assert len({(chunk.id, chunk.model) for chunk in chunks}) == 1
    assert (
        [c.choices[0].finish_reason for c in chunks if c.choices][-1]
        == reply.choices[0].finish_reason
        == "stop"
    )
    assert chunks[-1].usage == reply.usage
    assert reply.model == model


def test_every_answer_names_its_revision(service: Service) -> None:
    revision = service.adapters()["doctor@default"]["actual"]
    raw = service.client().chat.completions.with_raw_response
    for options in ({}, {"stream": True}):
        for model in ("doctor", f"doctor@{revision}"):
            reply = raw.create(**ask(model), **options)
            assert reply.headers["x-adapter-revision"] == revision
            reply.http_response.read()
    assert raw.create(**ask()).parse().system_fingerprint == f"doctor@{revision}"
    assert "x-adapter-revision" not in raw.create(**ask("xinglin-demo")).headers


def test_an_unknown_model(service: Service) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        service.client().chat.completions.create(**ask("nobody"))
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "doctor" in caught.value.message


def test_a_mistyped_alias_must_not_be_retried(service: Service) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        service.client().chat.completions.create(**ask("doctor@typo"))
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt(service: Service, stream: bool) -> None:
    long = {"messages": [{"role": "user", "content": QUESTION * 1000}], "stream": stream}
    with pytest.raises(openai.BadRequestError) as caught:
        service.client().chat.completions.create(**{**ask(), **long})
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, None),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, None),
        ({"top_p": 2}, "top_p"),
        ({"logprobs": True, "top_logprobs": 10_000}, None),
        ({"stream": "maybe"}, "stream"),
        ({"messages": []}, None),
        ({"response_format": {"type": "poem"}}, None),
        ({"logit_bias": {"999999": 1}}, None),
        ({"n": 129}, None),
        ({"tools": []}, None),
        ({"tool_choice": "auto"}, None),
        ({"top_logprobs": 2}, None),
        ({"response_format": {"type": "json_schema"}}, None),
        ({"cache_salt": ""}, None),
        ({"messages": None}, None),
        ({"structured_outputs": "x"}, None),
        ({"continue_final_message": True, "add_generation_prompt": True}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_values(service: Service, change: dict[str, Any], param: str | None, stream: bool) -> None:
    status, reply = service.call("POST", "/v1/chat/completions", {**ask(), "stream": stream, **change})
    assert status == 400, reply
    error = reply["error"]
    assert isinstance(error["code"], str)
    assert error["type"] == "invalid_request_error"
    if param:
        assert param in str(error["param"])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"hello"', b"\xff\xfe", b'{"model": NaN', b"[" * 100_000]
)
def test_malformed_json(service: Service, body: bytes) -> None:
    status, reply = service.call("POST", "/v1/chat/completions", body)
    assert (status, reply["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_missing_parameters(service: Service, missing: str) -> None:
    body = ask()
    del body[missing]
    status, reply = service.call("POST", "/v1/chat/completions", body)
    assert (status, reply["error"]["code"]) == (400, "missing_required_parameter")
    assert reply["error"]["param"] == missing


def test_too_large_a_body(service: Service) -> None:
    status, reply = service.call("POST", "/v1/chat/completions", b" " * (5 << 20))
    assert (status, reply["error"]["code"]) == (400, "request_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)]
)
def test_unknown_routes_have_openai_bodies(service: Service, method: str, path: str, status: int) -> None:
    found, reply = service.call(method, path)
    assert found == status
    assert isinstance(reply["error"]["code"], str)


def _tokens_generated(service: Service) -> float:
    found = re.search(r"^vllm:generation_tokens_total{.*} (.*)$", service.call("GET", "/metrics")[1], re.M)
    assert found
    return float(found[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_frees_its_resources(service: Service, stream: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    body = json.dumps(ask(max_tokens=900, min_tokens=900, ignore_eos=True, stream=stream))
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    revision = service.adapters()["doctor@default"]["actual"]
    held = f"doctor@{revision}"
    before = _tokens_generated(service)
    service.wait_for(lambda: service.adapters()["engine"]["leases"][held] > 0)
    connection.close()
    service.wait_for(lambda: service.adapters()["engine"]["leases"][held] == 0)
    assert _tokens_generated(service) - before < 900, "it went on though nobody listened"


def test_metrics_are_labeled_by_adapter_and_revision_but_never_by_client_text(
    service: Service,
) -> None:
    service.answer("doctor", QUESTION)
    for _ in service.client().chat.completions.create(**ask("doctor"), stream=True):
        pass
    service.answer("xinglin-demo", QUESTION)
    service.call("POST", "/v1/chat/completions", ask("made-up-name"))
    _, text = service.call("GET", "/metrics")
    who = f'adapter="doctor",revision="{service.adapters()["doctor@default"]["actual"]}"'
    for metric in (
        f'requests_total{{{who},status="200"}}',
        'requests_total{adapter="xinglin-demo",revision="base",status="200"}',
        'requests_total{adapter="unknown",revision="unknown",status="404"}',
        f"prompt_tokens_total{{{who}}}",
        f"completion_tokens_total{{{who}}}",
        f"time_to_first_token_seconds_count{{{who}}}",
        f"inter_token_latency_seconds_count{{{who}}}",
        f"adapter_loads_total{{{who}}}",
        'adapter_load_seconds_count{to="load"}',
        'adapter_load_seconds_count{to="ready"}',
        'adapter_proofs_total{adapter="doctor",result="passed"}',
    ):
        assert float(text.split(f"\nxinglin_{metric} ")[1].split("\n")[0]) > 0, metric
    assert "made-up-name" not in text


def test_prompts_and_keys_stay_out_of_the_log(service: Service) -> None:
    service.answer("doctor", "这句话不可以写进日志")
    assert "这句话" not in service.log
    assert "test-admin-key" not in service.log
