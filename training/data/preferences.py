"""Pairs of a better and a worse answer, answers with a label, and prompts.

    MedicalGPT  {"question": "…", "response_chosen": "…", "response_rejected": "…"}
    TRL         {"prompt", "chosen", "rejected"}, each of them text or messages; without a prompt, chosen and
                rejected are whole conversations that share their beginning
    ShareGPT    {"conversations": [...], "chosen": {"from": "gpt", "value": "…"}, "rejected": {...}}
    OpenAI      {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
    CareGPT     {"instruction": "…", "input": "…", "output": ["better", "worse"]}
    feedback    any chat row, with "label" (or LLaMA-Factory's "kto_tag"): true or false

What was asked may stand in any format of `chats`, with any of the first two pairs of keys.
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
    """`prompt`, `chosen` and `rejected`, as messages. Raises BadRow."""
    pair = _pair(found)
    if pair is None:
        raise BadRow("there is no pair of answers; expected chosen and rejected")
    chosen, rejected = (answer_in(answer, name) for name, answer in pair.items())
    if _plain(chosen) == _plain(rejected):
        raise BadRow(f"{' and '.join(pair)} are the same")
    if len(chosen) == len(rejected) == 1:
        prompt = _asked(found)
    else:
        shared = _shared(chosen, rejected)
        prompt = conversation({**found, "messages": chosen[:shared]})
        chosen, rejected = chosen[shared:], rejected[shared:]
    if prompt[-1]["role"] != "user":
        raise BadRow("the prompt must end with the user's message")
    for name, answer in zip(pair, (chosen, rejected), strict=True):
        if [message["role"] for message in answer] != ["assistant"]:
            raise BadRow(f"{name} must be one answer of the assistant to the prompt")
    return {"prompt": _plain(prompt), "chosen": _plain(chosen), "rejected": _plain(rejected)}


def to_feedback(found: Row) -> list[Row]:
    """`prompt`, `completion` and `label`; a pair makes two of them. Raises BadRow."""
    if _pair(found):
        row = to_preference(found)
        return [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": True},
            {"prompt": row["prompt"], "completion": row["rejected"], "label": False},
        ]
    messages = _plain(conversation(found))
    if messages[-1]["role"] != "assistant":
        raise BadRow("there is no answer for the label to judge")
    label = _label(found)
    if label is None:
        raise BadRow("label must be true or false")
    return [{"prompt": messages[:-1], "completion": messages[-1:], "label": label}]


def to_prompt(found: Row) -> Row:
    """`prompt`, and the answer that the data gives to it, if any, as `reference`. Raises BadRow."""
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
    """Whether the row gives a better and a worse answer. Raises BadRow."""
    return _pair(found) is not None


def _label(found: Row) -> bool | None:
    label = found.get("label", found.get("kto_tag"))
    return _LABELS.get(str(label).strip().lower()) if isinstance(label, str | int) else None


def _pair(found: Row) -> dict[str, Any] | None:
    """The better and the worse answer by their names, if the row has such."""
    output = found.get("output")
    if isinstance(output, list):
        if len(output) != 2:
            raise BadRow("output must be one answer, or a better and a worse one")
        return {"output[0]": output[0], "output[1]": output[1]}
    pair = next((pair for pair in _PAIRS if pair[0] in found or pair[1] in found), None)
    return {name: found.get(name) for name in pair} if pair else None


def _asked(found: Row) -> list[Message]:
    """What was asked, which has keys of its own."""
    asked = found["input"] if isinstance(found.get("input"), dict) else found
    if not has_conversation(asked):
        raise BadRow("there is no prompt")
    return conversation(
        {key: value for key, value in asked.items() if not (key == "output" and isinstance(value, list))}
    )


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with alike."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadRow("there is no prompt: chosen and rejected do not begin alike")
    return shared


def _plain(messages: list[Message]) -> list[Message]:
    """Without weights, which are for `read_chats`."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]
