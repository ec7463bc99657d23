"""Converts pairs of a better and a worse answer, answers with a label, and prompts.

    MedicalGPT  {"question": "…", "response_chosen": "…", "response_rejected": "…"}
    TRL         {"prompt", "chosen", "rejected"}, each text or messages; without a prompt, chosen and rejected are
                whole conversations with a common beginning
    ShareGPT    {"conversations": [...], "chosen": {"from": "gpt", "value": "…"}, "rejected": {...}}
    OpenAI      {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
    CareGPT     {"instruction": "…", "input": "…", "output": ["better", "worse"]}
    feedback    any chat row, with "label" (or LLaMA-Factory's "kto_tag"): true or false

The prompt may have any format of `chats`, with the answer keys of either of the first two formats.
"""

from typing import Any

from training.data.chats import Message, Row, answer_in, conversation, has_conversation
from training.data.errors import BadRow

_PAIRS = (
    ("chosen", "rejected"),
    ("response_chosen", "response_rejected"),
    ("preferred_output", "non_preferred_output"),
)
_LABELS = {
    "true": True, "1": True, "yes": True, "good": True,
    "false": False, "0": False, "no": False, "bad": False,
}  # fmt: skip


def to_preference(found: Row) -> Row:
    """Return `prompt`, `chosen` and `rejected` as messages. Raises BadRow."""
    pair = _pair(found)
    if pair is None:
        raise BadRow("no pair of answers; expected chosen and rejected")
    chosen, rejected = (answer_in(answer, name) for name, answer in pair.items())
    if _plain(chosen) == _plain(rejected):
        raise BadRow(f"{' and '.join(pair)} are identical")
    if len(chosen) == len(rejected) == 1:
        prompt = _asked(found)
    else:
        shared = _shared(chosen, rejected)
        prompt = conversation({**found, "messages": chosen[:shared]})
        chosen, rejected = chosen[shared:], rejected[shared:]
    if prompt[-1]["role"] != "user":
        raise BadRow("the prompt must end with a user message")
    for name, answer in zip(pair, (chosen, rejected), strict=True):
        if [message["role"] for message in answer] != ["assistant"]:
            raise BadRow(f"{name} must be one assistant message that answers the prompt")
    return {"prompt": _plain(prompt), "chosen": _plain(chosen), "rejected": _plain(rejected)}


def to_feedback(found: Row) -> list[Row]:
    """Return rows of `prompt`, `completion` and `label`; a pair makes two rows. Raises BadRow."""
    if _pair(found):
        row = to_preference(found)
        return [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": True},
            {"prompt": row["prompt"], "completion": row["rejected"], "label": False},
        ]
    messages = _plain(conversation(found))
    if messages[-1]["role"] != "assistant":
        raise BadRow("there is no answer for the label")
    label = _label(found)
    if label is None:
        raise BadRow("label must be true or false")
    return [{"prompt": messages[:-1], "completion": messages[-1:], "label": label}]


def to_prompt(found: Row) -> Row:
    """Return `prompt`, with the answer in the data, if any, as `reference`. Raises BadRow."""
    if _pair(found):
        row = to_preference(found)
        return {"prompt": row["prompt"], "reference": row["chosen"][0]["content"]}
    messages = _plain(conversation(found))
    if messages[-1]["role"] == "user":
        return {"prompt": messages}
    if _label(found) is False:
        return {"prompt": messages[:-1]}
    return {"prompt": messages[:-1], "reference": messages[-1]["content"]}


def has_pair(found: Row) -> bool:
    """Whether the row has a better and a worse answer. Raises BadRow."""
    return _pair(found) is not None


def _label(found: Row) -> bool | None:
    label = found.get("label", found.get("kto_tag"))
    return _LABELS.get(str(label).strip().lower()) if isinstance(label, str | int) else None


def _pair(found: Row) -> dict[str, Any] | None:
    """Return the better and the worse answer by key, or None."""
    output = found.get("output")
    if isinstance(output, list):
        if len(output) != 2:
            raise BadRow("output must be one answer, or a list of a better and a worse one")
        return {"output[0]": output[0], "output[1]": output[1]}
    pair = next((pair for pair in _PAIRS if pair[0] in found or pair[1] in found), None)
    return {name: found.get(name) for name in pair} if pair else None


def _asked(found: Row) -> list[Message]:
    """Return the prompt, which has keys of its own."""
    asked = found["input"] if isinstance(found.get("input"), dict) else found
    if not has_conversation(asked):
        raise BadRow("there is no prompt")
    return conversation(
        {key: value for key, value in asked.items() if not (key == "output" and isinstance(value, list))}
    )


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """Return the length of the common beginning of two conversations. Raises BadRow if there is none."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadRow("there is no prompt: chosen and rejected have no common beginning")
    return shared


def _plain(messages: list[Message]) -> list[Message]:
    """Return the messages without weights, which only `read_chats` uses."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]
