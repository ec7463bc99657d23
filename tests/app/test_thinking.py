"""A base model that reasons before it answers: constraints apply only after the reasoning."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import copy_products
from tests.service import Service, free_port

BEGIN, END = "<think>", "</think>"
ANSWERS = ["rest", "drink"]
SCHEMA = {"enum": ANSWERS}
QUESTION = [{"role": "user", "content": "感冒有什么症状？"}]
BUDGET = 6
TOOL = {"name": "give", "description": "Give a dose", "parameters": {"type": "object", "properties": {}}}


def let_think(base: Path) -> None:
    """Make the last two tokens those around reasoning, which the chat template opens for every answer."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    model = tokenizer["model"]
    last = sorted(model["vocab"], key=model["vocab"].get)[-2:]
    for text, old in zip((BEGIN, END), last, strict=True):
        token_id = model["vocab"].pop(old)
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != old and old not in pair]
        added = {**tokenizer["added_tokens"][0], "id": token_id, "content": text, "special": False}
        tokenizer["added_tokens"].append(added)
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = (base / "chat_template.jinja").read_text()
    opening = "<|im_start|>assistant\\n"
    assert template.count(opening) == 1
    (base / "chat_template.jinja").write_text(template.replace(opening, f"{opening}{BEGIN}\\n"))


@pytest.fixture(scope="module")
def service(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = copy_products(demo_dir, tmp_path_factory.mktemp("thinking") / "data")
    let_think(data_dir / "models" / "xinglin-demo")
    settings = {"XINGLIN_REASONING_PARSER": "qwen3", "XINGLIN_TOOL_CALL_PARSER": "hermes"}
    service = Service(data_dir, free_port(), settings)
    service.start()
    yield service
    assert service.stop() == 0


def ask(service: Service, path: str, **body: Any) -> Any:
    asked = {"model": "xinglin-demo", "temperature": 0, "thinking_token_budget": BUDGET, **body}
    status, reply = service.call("POST", path, asked)
    assert status == 200, reply
    return reply


def events(reply: str) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in reply.splitlines() if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


def check(thought: str | None, answer: str | None) -> None:
    """The reasoning is free text, not JSON; the answer is JSON."""
    assert thought
    assert thought.lstrip()[0] not in '{"'
    assert answer
    assert json.loads(answer) in ANSWERS


def test_a_schema_constrains_the_answer_but_not_the_reasoning(service: Service) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "dose", "schema": SCHEMA}}
    body = {"messages": QUESTION, "max_tokens": 80, "response_format": wanted}
    message = ask(service, "/v1/chat/completions", **body)["choices"][0]["message"]
    check(message["reasoning"], message["content"])

    deltas = [
        choice["delta"]
        for event in events(ask(service, "/v1/chat/completions", stream=True, **body))
        for choice in event["choices"]
    ]
    thought, answer = (
        "".join(delta.get(part) or "" for delta in deltas) for part in ("reasoning", "content")
    )
    check(thought, answer)
    assert answer == message["content"]


def test_a_budget_ends_the_reasoning(service: Service) -> None:
    lengths = []
    for budget in (1, 12):
        body = {"messages": QUESTION, "max_tokens": 60, "thinking_token_budget": budget}
        message = ask(service, "/v1/chat/completions", **body)["choices"][0]["message"]
        lengths.append(len(message["reasoning"] or ""))
        assert message["content"]
    assert lengths[0] < lengths[1]


def test_a_required_tool_is_called_after_the_reasoning(service: Service) -> None:
    tools = [{"type": "function", "function": TOOL}]
    body = {"messages": QUESTION, "max_tokens": 120, "tools": tools, "tool_choice": "required"}
    message = ask(service, "/v1/chat/completions", **body)["choices"][0]["message"]
    assert message["reasoning"]
    assert "tool_call" not in message["reasoning"]
    # The tiny model never ends the arguments; without the tool it would have written none.
    assert message["content"].startswith('<tool_call>\n{"name": "give", "arguments": ')


def test_a_required_tool_that_can_be_called_is_called(service: Service) -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {**TOOL, "parameters": nothing, "strict": True}}]
    body = {"messages": QUESTION, "max_tokens": 200, "tools": tools, "tool_choice": "required"}
    # The grammar allows white space between the braces, and the tiny model's likeliest token is more of it.
    body |= {"temperature": 1, "seed": 3}
    (choice,) = ask(service, "/v1/chat/completions", **body)["choices"]
    assert choice["message"]["reasoning"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("give", {})

    deltas = [
        part["delta"]
        for event in events(ask(service, "/v1/chat/completions", stream=True, **body))
        for part in event["choices"]
    ]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == choice["message"]["reasoning"]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    assert "".join(call.get("name") or "" for call in calls) == "give"
    assert json.loads("".join(call.get("arguments") or "" for call in calls)) == {}


@pytest.mark.parametrize("is_stream", [True, False])
def test_messages_reason_before_a_tool_call(service: Service, is_stream: bool) -> None:
    tool = {
        "name": "give",
        "description": "Give a dose",
        "input_schema": {"type": "object", "properties": {}},
    }
    body = {"messages": QUESTION, "max_tokens": 100, "tools": [tool], "tool_choice": {"type": "any"}}
    reply = ask(service, "/v1/messages", stream=is_stream, thinking_token_budget=None, **body)
    if is_stream:
        started = [event for event in events(reply) if event["type"] == "content_block_start"]
        kinds = [event["content_block"]["type"] for event in started]
        thought = "".join(event["delta"].get("thinking") or "" for event in events(reply) if "delta" in event)
    else:
        kinds = [block["type"] for block in reply["content"]]
        thought = reply["content"][0]["thinking"]
    assert kinds[0] == "thinking"
    assert thought
    assert "tool_call" not in thought.partition(END)[0][:20]


def test_streamed_responses_reason_first(service: Service) -> None:
    wanted = {"format": {"type": "json_schema", "name": "dose", "schema": SCHEMA}}
    body = {"input": "感冒有什么症状？", "max_output_tokens": 80, "text": wanted, "stream": True}
    found = events(ask(service, "/v1/responses", thinking_token_budget=None, **body))
    added = [event["item"]["type"] for event in found if event["type"] == "response.output_item.added"]
    assert added[0] == "reasoning"
    thought = "".join(event["delta"] for event in found if event["type"].endswith("reasoning_text.delta"))
    assert thought
    assert not thought.lstrip().startswith("{")


def test_responses_reason_first(service: Service) -> None:
    wanted = {"format": {"type": "json_schema", "name": "dose", "schema": SCHEMA}}
    body = {"input": "感冒有什么症状？", "max_output_tokens": 80, "text": wanted}
    body["thinking_token_budget"] = (
        None  # not a parameter there: the reasoning ends by itself, or the answer does
    )
    reply = ask(service, "/v1/responses", **body)
    kinds = [item["type"] for item in reply["output"]]
    assert kinds[0] == "reasoning"
    assert not reply["output"][0]["content"][0]["text"].lstrip().startswith("{")
