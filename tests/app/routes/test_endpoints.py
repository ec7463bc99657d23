"""The endpoints besides chat, with base model and adapters."""

import json
import re
from typing import Any

import pytest

from tests.service import Service
from tests.trainer import Trainer

QUESTION = "感冒有什么症状？"
MESSAGES = [{"role": "user", "content": QUESTION}]
MODELS = [("xinglin-demo", None), ("doctor", "default")]


@pytest.mark.parametrize(("model", "adapter"), MODELS)
def test_all_chat_endpoints_give_the_answer_of_training(
    service: Service, trainer: Trainer, model: str, adapter: str | None
) -> None:
    expected = trainer.tokenizer.decode(trainer.answer(QUESTION, adapter), skip_special_tokens=True)
    prompt = trainer.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    common = {"model": model, "temperature": 0}
    _, completion = service.call("POST", "/v1/completions", {**common, "prompt": prompt, "max_tokens": 200})
    assert completion["choices"][0]["text"] == expected
    _, response = service.call(
        "POST", "/v1/responses", {**common, "input": QUESTION, "max_output_tokens": 200}
    )
    assert response["output"][0]["content"][0]["text"] == expected
    _, message = service.call("POST", "/v1/messages", {**common, "messages": MESSAGES, "max_tokens": 200})
    assert message["content"] == [{"type": "text", "text": expected}]
    assert message["stop_reason"] == "end_turn"


def test_token_counts_match_the_models_input(service: Service) -> None:
    _, chat = service.call(
        "POST", "/v1/chat/completions", {"model": "doctor", "messages": MESSAGES, "max_tokens": 1}
    )
    count = chat["usage"]["prompt_tokens"]
    _, tokens = service.call("POST", "/tokenize", {"model": "doctor", "messages": MESSAGES})
    assert tokens["count"] == len(tokens["tokens"]) == count
    _, counted = service.call("POST", "/v1/messages/count_tokens", {"model": "doctor", "messages": MESSAGES})
    assert counted["input_tokens"] == count
    _, text = service.call("POST", "/detokenize", {"model": "doctor", "tokens": tokens["tokens"]})
    assert QUESTION in text["prompt"]


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize"]
)
def test_a_wrong_body_is_the_clients_error(service: Service, path: str) -> None:
    for body, status, code in (
        ({}, 400, "missing_required_parameter"),
        ({"model": "nobody", "messages": []}, 404, "model_not_found"),
        ({"model": "doctor", "messages": 5, "input": 5, "prompt": 5, "max_tokens": 5}, 400, "invalid_value"),
    ):
        got, reply = service.call("POST", path, body)
        assert (got, reply["error"]["code"]) == (status, code), (path, body, reply)
        assert ("type" in reply) == path.startswith("/v1/messages")  # Anthropic's shape
        assert reply["error"]["message"]


def test_a_prompt_of_token_ids_is_one_prompt(service: Service) -> None:
    body = {"model": "doctor", "prompt": [1, 2, 3] * 300, "max_tokens": 1}
    assert service.call("POST", "/v1/completions", body)[1]["usage"]["prompt_tokens"] == 900
    status, reply = service.call("POST", "/v1/completions", {**body, "prompt": ["a"] * 1025})
    assert (status, reply["error"]["param"]) == (400, "prompt")
    status, reply = service.call("POST", "/v1/completions", {**body, "prompt": ["a"] * 20, "n": 100})
    assert (status, reply["error"]["param"]) == (400, "prompt")


def created(service: Service, **more: Any) -> Any:
    body = {"model": "doctor", "input": QUESTION, "temperature": 0, "max_output_tokens": 200, **more}
    status, reply = service.call("POST", "/v1/responses", body)
    assert status == 200, reply
    return reply


def test_a_response_is_stored_continued_and_deleted(service: Service) -> None:
    one = created(service)
    path = f"/v1/responses/{one['id']}"
    assert service.call("GET", path) == (200, one)
    two = created(service, previous_response_id=one["id"], input="And the treatment?")
    assert two["usage"]["input_tokens"] > one["usage"]["total_tokens"]
    assert service.call("DELETE", path)[1] == {"id": one["id"], "object": "response", "deleted": True}
    for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel")):
        status, reply = service.call(method, where)
        assert (status, reply["error"]["code"]) == (404, "response_not_found")
    kept = created(service, store=False)
    assert service.call("GET", f"/v1/responses/{kept['id']}")[0] == 404


def test_a_response_in_the_background_holds_its_adapter_until_it_is_done(service: Service) -> None:
    before = written(service)
    one = created(service, background=True)
    path = f"/v1/responses/{one['id']}"
    assert one["status"] == "queued"
    service.wait_for(lambda: service.call("GET", path)[1]["status"] == "completed")
    service.wait_for(lambda: in_flight(service) == 0)
    done = service.call("GET", path)[1]
    assert written(service) - before == done["usage"]["output_tokens"]
    assert done["output"][0]["content"] == created(service)["output"][0]["content"]
    status, reply = service.call("POST", f"{path}/cancel")
    assert (status, reply["error"]["param"]) == (400, "response_id")

    long = created(service, background=True, max_output_tokens=900, ignore_eos=True)
    assert in_flight(service) == 1
    path = f"/v1/responses/{long['id']}"
    assert service.call("POST", f"{path}/cancel")[1]["status"] == "cancelled"
    assert service.call("GET", path)[1]["status"] == "cancelled"
    service.wait_for(lambda: in_flight(service) == 0)


def test_the_events_of_a_response_in_the_background_can_be_read_again(service: Service) -> None:
    client = service.client()
    stream = client.responses.create(
        model="doctor", input=QUESTION, temperature=0, background=True, stream=True, max_output_tokens=200
    )
    first = next(iter(stream))
    stream.close()  # the response continues
    assert first.type == "response.created"
    again = [*client.responses.retrieve(first.response.id, stream=True)]
    assert again[0].type == "response.created"
    assert again[-1].type == "response.completed"
    text = "".join(event.delta for event in again if event.type == "response.output_text.delta")
    assert text == created(service)["output"][0]["content"][0]["text"]
    later = [
        *client.responses.retrieve(first.response.id, stream=True, starting_after=again[2].sequence_number)
    ]
    assert [event.sequence_number for event in later] == [event.sequence_number for event in again[3:]]


def in_flight(service: Service) -> float:
    return metric(service, "xinglin_requests_in_flight ")


def written(service: Service) -> float:
    return metric(service, 'xinglin_completion_tokens_total{adapter="doctor"')


def metric(service: Service, beginning: str) -> float:
    """Return the sum of all samples whose line starts with `beginning`."""
    lines = str(service.call("GET", "/metrics")[1]).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(beginning))


def test_a_stream_of_many_choices_is_complete(service: Service) -> None:
    """Three prompts, two answers each, with every token reported."""
    stream = service.client().completions.create(
        model="doctor",
        prompt=["a", "b", "c"],
        n=2,
        max_tokens=5,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    ends = [choice.index for chunk in stream for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == [0, 1, 2, 3, 4, 5]


def test_batched_conversations_are_answered_as_single_ones(service: Service) -> None:
    conversations = [
        [{"role": "user", "content": text}]
        for text in ("感冒有什么症状？", "What helps with a cold?", "你好")
    ]
    body = {"model": "doctor", "temperature": 0, "max_tokens": 20, "logprobs": True}
    status, reply = service.call("POST", "/v1/chat/completions/batch", {**body, "messages": conversations})
    assert status == 200, reply
    alone = [
        service.call("POST", "/v1/chat/completions", {**body, "messages": messages})[1]
        for messages in conversations
    ]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    texts = [one["choices"][0]["message"]["content"] for one in alone]
    assert [choice["message"]["content"] for choice in reply["choices"]] == texts
    for choice, text in zip(reply["choices"], texts, strict=True):
        written = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
        assert written.startswith(text.encode())
    for field in ("prompt_tokens", "completion_tokens"):
        assert reply["usage"][field] == sum(one["usage"][field] for one in alone)
    assert (reply["model"], reply["system_fingerprint"]) == ("doctor", alone[0]["system_fingerprint"])


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [[]]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"messages": [[{"role": "user", "content": "x"}]] * 1025}, "messages"),
        ({"stream": True}, "stream"),
        ({"tools": [{"type": "function", "function": {"name": "book"}}]}, "tools"),
        ({"n": 2}, "n"),
    ],
    ids=str,
)
def test_invalid_batches_are_refused(service: Service, wrong: dict[str, Any], param: str) -> None:
    body = {"model": "doctor", "messages": [[{"role": "user", "content": "x"}]], "max_tokens": 1, **wrong}
    status, reply = service.call("POST", "/v1/chat/completions/batch", body)
    assert status == 400, reply
    assert param in reply["error"]["message"].lower()


def test_the_openapi_page_names_every_parameter(service: Service) -> None:
    status, page = service.call("GET", "/openapi.json", key=None)
    assert status == 200
    text = json.dumps(page)
    assert {*re.findall(r'"#/components/schemas/([^"]+)"', text)} <= page["components"]["schemas"].keys()
    expected = {
        "/v1/chat/completions": (
            "messages n seed stop logprobs top_logprobs logit_bias presence_penalty repetition_penalty min_p top_k "
            "tools tool_choice response_format structured_outputs stream_options priority prompt_logprobs echo "
            "continue_final_message chat_template_kwargs truncation"
        ),
        "/v1/chat/completions/batch": "messages seed stop logprobs top_logprobs min_p top_k response_format",
        "/v1/completions": "prompt n seed stop logprobs logit_bias suffix echo min_p top_k prompt_logprobs",
        "/v1/responses": "input instructions tools previous_response_id background store stream truncation",
        "/v1/messages": "messages max_tokens system stop_sequences temperature tools truncation",
        "/v1/messages/count_tokens": "messages system tools",
        "/tokenize": "prompt messages add_special_tokens return_token_strs",
        "/detokenize": "tokens",
    }
    for path, names in expected.items():
        content = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        assert not {*names.split()} - _properties(content["schema"], page["components"]["schemas"]), path


def _properties(schema: Any, parts: Any) -> set[str]:
    name = schema.get("$ref", "").removeprefix("#/components/schemas/")
    below = [*schema.get("anyOf", []), *schema.get("allOf", []), *([parts[name]] if name else [])]
    return {*schema.get("properties", {})}.union(*(_properties(one, parts) for one in below))
