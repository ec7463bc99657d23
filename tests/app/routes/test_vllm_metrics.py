"""vLLM's metrics and headers for dashboards, autoscalers and routers."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service import Service

MODEL = ("xinglin-demo", "0")


def metrics(service: Service) -> dict[str, float]:
    """Return the vLLM samples of the demo's base model, by name and reason if any."""
    found = {}
    for family in text_string_to_metric_families(service.call("GET", "/metrics", key=None)[1]):
        for sample in family.samples:
            labels = sample.labels
            if (labels.get("model_name"), labels.get("engine")) == MODEL and "le" not in labels:
                found[" ".join([sample.name, *filter(None, [labels.get("finished_reason")])])] = sample.value
    return found


def test_the_names_of_vllms_metrics_exist(service: Service) -> None:
    found = metrics(service)
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "time_to_first_token_seconds_sum", "inter_token_latency_seconds_sum",
        "e2e_request_latency_seconds_sum", "iteration_tokens_total_count", "request_success_total stop",
        "request_success_total length", "request_success_total abort", "prefix_cache_hits_total",
    ):  # fmt: skip
        assert f"vllm:{name}" in found


@pytest.mark.parametrize("is_stream", [True, False])
def test_metrics_match_the_usage_of_answers(service: Service, is_stream: bool) -> None:
    before = metrics(service)
    client = service.client()

    def ask(number: int) -> tuple[int, int]:
        options = {"max_tokens": 4} if number % 2 else {"stop": ["。"], "max_tokens": 200}
        messages = [{"role": "user", "content": f"感冒有什么症状？{number}"}]
        model = "doctor" if number % 3 else "xinglin-demo"
        if not is_stream:
            usage = client.chat.completions.create(model=model, messages=messages, **options).usage
        else:
            usage = None
            stream = client.chat.completions.create(
                model=model, messages=messages, stream=True, stream_options={"include_usage": True}, **options
            )
            for chunk in stream:
                usage = chunk.usage or usage
        return usage.prompt_tokens, usage.completion_tokens

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(ask, range(12)))
    service.wait_for(lambda: metrics(service)["vllm:num_requests_running"] == 0)
    after = metrics(service)
    grown = {
        name.removeprefix("vllm:"): after[name] - before[name]
        for name in after
        if not name.endswith("_created")
    }
    prompts, tokens = (sum(of_one) for of_one in zip(*told, strict=True))
    # A token that begins a stop string is generated but not reported.
    assert grown["prompt_tokens_total"] == grown["request_prompt_tokens_sum"] == prompts
    assert tokens == grown["generation_tokens_total"] == grown["request_generation_tokens_sum"]
    assert sum(grown[f"request_success_total {reason}"] for reason in ("stop", "length")) == 12
    assert grown["request_success_total length"] >= 6
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens"):
        assert grown[f"{name}_count"] == 12
    assert grown["inter_token_latency_seconds_count"] == tokens - 12
    assert grown["iteration_tokens_total_sum"] == prompts + tokens - grown["prefix_cache_hits_total"]
    # An answer takes the time to its first token plus the gaps; the rest is small.
    parts = grown["time_to_first_token_seconds_sum"] + grown["inter_token_latency_seconds_sum"]
    assert 0.5 * parts < grown["e2e_request_latency_seconds_sum"] < 2 * parts + 1
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_running_requests_are_reported(service: Service) -> None:
    stream = service.client().chat.completions.create(
        model="doctor",
        messages=[{"role": "user", "content": "感冒有什么症状？"}],
        stream=True,
        max_tokens=200,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    found = metrics(service)
    assert found["vllm:num_requests_running"] == 1
    assert 0 < found["vllm:kv_cache_usage_perc"] < 1
    text = service.call("GET", "/metrics", key=None)[1]
    assert re.search(r'vllm:lora_requests_info\{max_lora="\d+",running_lora_adapters="doctor",', text)
    stream.close()
    service.wait_for(lambda: metrics(service)["vllm:num_requests_running"] == 0)
    assert metrics(service)["vllm:kv_cache_usage_perc"] == 0


@pytest.mark.parametrize("asked", ["TEXT", "JSON", "json", "BIN", None])
def test_a_response_has_the_engines_load_if_requested(service: Service, asked: str | None) -> None:
    body = {"model": "doctor", "prompt": "感冒", "max_tokens": 1}
    headers = {"content-type": "application/json"} | (
        {"endpoint-load-metrics-format": asked} if asked else {}
    )
    with urlopen(Request(f"{service.url}/v1/completions", json.dumps(body).encode(), headers)) as response:
        found = response.headers["endpoint-load-metrics"]
    if asked == "TEXT":
        assert re.fullmatch(
            r"TEXT named_metrics\.kv_cache_usage_perc=[\d.e-]+, named_metrics\.num_requests_waiting=\d+\.0",
            found,
        )
    elif asked in ("JSON", "json"):
        load = json.loads(found.removeprefix("JSON "))["named_metrics"]
        assert set(load) == {"kv_cache_usage_perc", "num_requests_waiting"}
    else:
        assert found is None
