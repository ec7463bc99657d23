"""Example request bodies that /docs shows for the endpoints that an engine answers."""

from typing import Any

from app.engine.base import Endpoint

_MESSAGES = [
    {"role": "system", "content": "You are a careful doctor."},
    {"role": "user", "content": "感冒有什么症状？"},
]

_EXAMPLES: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: {
        "plain": {"model": "doctor", "messages": _MESSAGES},
        "streamed": {
            "model": "doctor@default",
            "messages": _MESSAGES,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "sampled": {
            "model": "doctor",
            "messages": _MESSAGES,
            "n": 2,
            "seed": 7,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "max_completion_tokens": 200,
            "stop": ["\n\n"],
            "logprobs": True,
            "top_logprobs": 3,
        },
        "structured": {
            "model": "doctor",
            "messages": _MESSAGES,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "triage",
                    "schema": {
                        "type": "object",
                        "properties": {"urgency": {"enum": ["low", "high"]}, "advice": {"type": "string"}},
                        "required": ["urgency", "advice"],
                    },
                },
            },
        },
        "one of several answers": {
            "model": "doctor",
            "messages": _MESSAGES,
            "structured_outputs": {"choice": ["yes", "no"]},
        },
        "tools": {
            "model": "doctor",
            "messages": _MESSAGES,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "book",
                        "description": "Book an appointment",
                        "parameters": {"type": "object", "properties": {"day": {"type": "string"}}},
                    },
                }
            ],
            "tool_choice": "required",
        },
    },
    Endpoint.CHAT_BATCH: {
        "two conversations": {
            "model": "doctor",
            "messages": [_MESSAGES, [{"role": "user", "content": "What helps with a cold?"}]],
        },
    },
    Endpoint.COMPLETIONS: {
        "plain": {"model": "doctor", "prompt": "Aspirin is", "max_tokens": 20},
        "scored": {"model": "doctor", "prompt": "Aspirin is", "max_tokens": 1, "echo": True, "logprobs": 1},
    },
    Endpoint.RESPONSES: {
        "plain": {
            "model": "doctor",
            "instructions": "You are a careful doctor.",
            "input": "感冒有什么症状？",
        },
        "in the background": {"model": "doctor", "input": "感冒有什么症状？", "background": True},
    },
    Endpoint.MESSAGES: {
        "plain": {"model": "doctor", "max_tokens": 200, "messages": _MESSAGES[1:]},
    },
    Endpoint.COUNT_TOKENS: {"plain": {"model": "doctor", "messages": _MESSAGES[1:]}},
    Endpoint.TOKENIZE: {
        "text": {"model": "doctor", "prompt": "感冒有什么症状？", "return_token_strs": True},
        "conversation": {"model": "doctor", "messages": _MESSAGES},
    },
    Endpoint.DETOKENIZE: {"plain": {"model": "doctor", "tokens": [1, 2, 3]}},
}


def request_body(endpoint: Endpoint) -> dict[str, Any]:
    """Return the OpenAPI description of the body of `endpoint`."""
    examples = {name: {"value": example} for name, example in _EXAMPLES[endpoint].items()}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "additionalProperties": True},
                    "examples": examples,
                }
            },
        }
    }
