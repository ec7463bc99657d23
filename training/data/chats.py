"""Converts conversations of all formats to OpenAI messages.

    OpenAI      {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    ShareGPT    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}, or "items"
    Alpaca      {"instruction": "…", "input": "…", "output": "…"}
    literature  {"instruction": "<user>: … <bot>: … <user>: …", "output": "…"}
    HuatuoGPT   {"data": ["问：…", "答：…"]}
    pairs       {"prompt", "completion"}, {"question", "answer"}, {"query", "response"}, {"问", "答"}

Every format may have a "system" (or "system_prompt"); Alpaca, literature and pairs may have a "history": [["…", "…"]].
"""

import json
import re
from typing import Any

from training.data.errors import BadRow, shown

Row = dict[str, Any]
Message = dict[str, Any]
"""`role`, `content` and optionally `weight` 0: an answer that is context without loss."""

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip
_TOOL_ROLES = {"tool", "function", "function_call", "observation"}
_NO_TOOLS = "tool calls are not supported: remove such rows"
_LISTS = ("messages", "conversations", "items")
_ANSWERS = {
    "instruction": "output", "prompt": "completion", "question": "answer", "query": "response", "问": "答",
}  # fmt: skip
_LITERATURE = re.compile(r"\s*<(user|bot)>\s*[:：]\s*")
_HUATUO = re.compile(r"\s*([问答])\s*[:：]\s*")
_UNUSABLE = {
    "\0": "a NUL character",
    "\ufffd": "U+FFFD from a wrong conversion: convert the original file again",
}
_UNUSABLE_OR_HALF = re.compile("[\0\ufffd\ud800-\udfff]")


def to_chat(found: Row) -> Row:
    """Return `{"messages": [...]}`, which ends with the assistant. Raises BadRow."""
    messages = conversation(found)
    if messages[-1]["role"] != "assistant":
        raise BadRow("no answer to learn: the last message must be from the assistant")
    if not any(message.get("weight", 1) for message in messages if message["role"] == "assistant"):
        raise BadRow("no answer to learn: all answers have weight 0")
    return {"messages": messages}


def to_document(found: Row) -> Row:
    """Return `{"text": "…"}` or a chat. Raises BadRow."""
    return {"text": text(found["text"], "text")} if "text" in found else to_chat(found)


def has_conversation(found: Row) -> bool:
    """Whether the row has a key of a conversation or question."""
    return any(key in found for key in (*_LISTS, "data", *_ANSWERS))


def conversation(found: Row) -> list[Message]:
    """Return the messages of a row: an optional system message, then user and assistant in turns.

    The last answer may be missing. Raises BadRow.
    """
    if any(found.get(key) not in (None, "", "[]", []) for key in ("tools", "functions")):
        raise BadRow(_NO_TOOLS)
    key = next((key for key in _LISTS if key in found), None)
    if key:
        messages = messages_in(found[key], key)
    elif "data" in found:
        messages = _from_huatuogpt(items_in(found["data"], "data"))
    else:
        messages = _from_question(found)
    return _in_turns(_system(found, messages) + messages)


def _in_turns(messages: list[Message]) -> list[Message]:
    """Return the messages without an assistant greeting before the first question.

    Raises BadRow unless user and assistant alternate after an optional system message.
    """
    system, turns = (
        (messages[:1], messages[1:]) if messages and messages[0]["role"] == "system" else ([], messages)
    )
    if len(turns) > 1 and turns[0]["role"] == "assistant":  # a greeting
        turns = turns[1:]
    if not turns:
        raise BadRow("there is no user message")
    for number, message in enumerate(turns, 1):
        if message["role"] != ("user" if number % 2 else "assistant"):
            raise BadRow(
                f"turn {number} is from {message['role']!r}: user and assistant must alternate, user first"
            )
    return [*system, *turns]


def answer_in(value: Any, name: str) -> list[Message]:
    """Return an answer given as text, one message or a list of messages. Raises BadRow."""
    if isinstance(value, dict | list):
        return messages_in(value if isinstance(value, list) else [value], name)
    return [{"role": "assistant", "content": text(value, name)}]


def messages_in(value: Any, name: str) -> list[Message]:
    """Return the messages of a list in OpenAI or ShareGPT format. Raises BadRow."""
    return [_message(item, f"{name}[{number}]") for number, item in enumerate(items_in(value, name))]


def items_in(value: Any, name: str) -> list[Any]:
    """Return a list; a CSV cell holds it as JSON. Raises BadRow."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{name} must be a list, but is not valid JSON") from error
    if not isinstance(value, list):
        raise BadRow(f"{name} must be a list")
    return value


def text(value: Any, name: str) -> str:
    """Return text that a tokenizer accepts. Raises BadRow."""
    if value is None:
        raise BadRow(f"{name} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, not {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    if unusable := _UNUSABLE_OR_HALF.search(value):
        raise BadRow(f"{name} contains {_UNUSABLE.get(unusable[0], 'half of a surrogate pair')}")
    return value


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise BadRow(f"{name} must be an object with role and content, or from and value")
    said = item.get("role") or item.get("from")
    role = text(said, f"{name}: role").strip().lower()
    if role in _TOOL_ROLES or item.get("tool_calls") or item.get("function_call"):
        raise BadRow(_NO_TOOLS)
    if role not in _ROLES:
        raise BadRow(f"{name} is from {shown(role)}; expected system, user or assistant")
    content = item["content"] if item.get("content") is not None else item.get("value")
    message: Message = {"role": _ROLES[role], "content": text(_joined(content, name), f"{name}: content")}
    weight = item.get("weight")
    if weight is not None:
        if message["role"] != "assistant" or weight not in (0, 1):
            raise BadRow(f"{name}: weight must be 0 or 1, and only on assistant messages")
        if not weight:
            message["weight"] = 0
    return message


def _joined(content: Any, name: str) -> Any:
    """Join content parts, as OpenAI clients write them, into one text. Raises BadRow for parts that are not text."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "input_text", "output_text"):
            raise BadRow(f"{name}: content has a part of type {shown(str(kind))}; only text is supported")
    return "".join(text(part.get("text"), f"{name}: content") for part in content)


def _system(found: Row, messages: list[Message]) -> list[Message]:
    """Return the system message that a row has outside its messages."""
    given = found.get("system") or found.get("system_prompt")
    if not given:
        return []
    content = text(given, "system")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != content:
            raise BadRow("there are two different system messages")
        return []
    return [{"role": "system", "content": content}]


def _from_huatuogpt(items: list[Any]) -> list[Message]:
    messages = []
    for number, item in enumerate(items):
        said = text(item, f"data[{number}]")
        prefix = _HUATUO.match(said)
        mark, role = ("答", "assistant") if number % 2 else ("问", "user")
        if prefix and prefix[1] != mark:
            raise BadRow(f"data[{number}] must be from the {role}, but starts with {prefix[1]}")
        content = said[prefix.end() :] if prefix else said
        messages.append({"role": role, "content": text(content, f"data[{number}]")})
    # Published conversations often end with an unanswered question.
    return messages[:-1] if len(messages) % 2 and len(messages) > 1 else messages


def _from_question(found: Row) -> list[Message]:
    """Return the messages of a row with a question key, an answer key and an optional history."""
    key = next((key for key in _ANSWERS if key in found), None)
    if key is None:
        keys = ", ".join(sorted({shown(name) for name in list(found)[:8]})) or "nothing"
        raise BadRow(
            f"found {keys}; expected messages, conversations, items or data, or a pair such as "
            f"{', '.join(f'{question} and {answer}' for question, answer in _ANSWERS.items())}"
        )
    messages = []
    for number, pair in enumerate(items_in(found.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"history[{number}] must be a pair of question and answer")
        messages += [
            {"role": role, "content": text(said, f"history[{number}]")}
            for role, said in zip(("user", "assistant"), pair, strict=True)
        ]
    messages += _asked(found, key)
    answer = found.get(_ANSWERS[key])
    return messages if answer in (None, "") else messages + answer_in(answer, _ANSWERS[key])


def _asked(found: Row, key: str) -> list[Message]:
    if isinstance(found[key], list):
        # Only the completion has loss, not the answers in the prompt.
        given = messages_in(found[key], key)
        return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in given]
    question = text(found[key], key)
    more = found.get("input", "") if key == "instruction" else ""
    if more and not (isinstance(more, str) and more.isspace()):
        question += "\n" + text(more, "input")
    if key != "instruction" or not _LITERATURE.match(question):
        return [{"role": "user", "content": question}]
    _, *parts = _LITERATURE.split(question)
    return [
        {"role": _ROLES[role], "content": text(said, "instruction")}
        for role, said in zip(parts[::2], parts[1::2], strict=True)
    ]
