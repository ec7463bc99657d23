"""Tokenizes chats and computes the loss mask: loss is on the assistant's answers and their stop tokens.

The mask is exact for any chat template, or an error is raised. If a template has generation marks, they delimit the
answers. Otherwise an answer begins where the prompt that a server renders for it ends. Markers inserted into the
contents and removed again locate each message in the rendered text; the offsets of the fast tokenizer map it to tokens.
A token belongs to an answer if it begins in it. A token that begins in the prompt and reaches into the answer is part
of the server's prompt and has no loss.

Only rendered text has loss. If the template drops the reasoning of an answer once other turns follow, the rest of the
answer has loss; if it inserts an empty reasoning block after the prompt, the block has loss too.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from adapters.plain_text import Piece, PlainText

Message = dict[str, Any]

# Markers are private-use characters, which no template cuts, trims or changes: one per message and kind.
_FIRST_MARKER = 0xF0000
_MARKER = re.compile("([\U000f0000-\U000ffffd])")
_KINDS = _BEGIN, _AFTER_REASONING, _END = range(3)

_TAG = re.compile(r"<[^<>\s]*>\s*")
_REASONING_END = re.compile(r"</think>\s*")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class MaskError(ValueError):
    """The answers of a chat cannot be located exactly in its tokens. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenized chat with its loss mask."""

    input_ids: list[int]
    """Exactly the ids of `tokenizer.apply_chat_template`, up to max_length."""
    loss_mask: list[int]
    """1 for every token with loss, else 0; as long as input_ids."""
    is_cut: bool
    """Whether max_length cut tokens off the end."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """Position of an answer in the rendered text, in characters."""

    number: int
    """Number of the message, from 1."""
    spans: list[tuple[int, int]]
    end: int
    """End of the content."""
    is_stopped: bool
    """Whether the spans include the stop token already."""
    limit: int
    """Start of the next message; the stop token is before it."""


def encode(tokenizer: Any, messages: Sequence[Message], max_length: int | None = None) -> Encoded:
    """Tokenize a chat, with loss on the assistant's answers and their stop tokens.

    An answer with `"weight": 0` has no loss. Raises MaskError if the template cannot render the chat, if an answer
    cannot be located, or if an answer ends without a stop token.
    """
    if not tokenizer.is_fast:
        raise MaskError("the tokenizer is not a fast tokenizer: add a tokenizer.json to the base model")
    messages = _as_text(tokenizer, messages)
    text = _render(tokenizer, messages)
    ids, offsets = _tokens(tokenizer, text)
    begins = _begins(tokenizer, ids, offsets)
    mask = [0] * len(ids)
    for answer in _answers(tokenizer, messages, text):
        for start, end in answer.spans:
            first, beyond = bisect_left(begins, start), bisect_left(begins, end)
            mask[first:beyond] = [1] * (beyond - first)
        if not answer.is_stopped:
            end = bisect_left(begins, answer.spans[-1][1])
            beyond = _stop(tokenizer, ids, begins, answer) + 1
            mask[end:beyond] = [1] * (beyond - end)
    is_cut = max_length is not None and len(ids) > max_length
    return Encoded(ids[:max_length], mask[:max_length], is_cut)


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the ids of the prompt as a server renders it: the chat and the opening of the assistant's turn."""
    return _tokens(tokenizer, _render(tokenizer, _as_text(tokenizer, messages), prompt=True))[0]


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a whole chat, including anything the template adds after the last message."""
    return _tokens(tokenizer, _render(tokenizer, _as_text(tokenizer, messages)))[0]


def template_stops(tokenizer: Any) -> list[int]:
    """Return the stop tokens that the chat template puts after an answer, inside a chat and at its end.

    Empty if the template ends answers without a special token, or if none can be located.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    found: list[int] = []
    for messages in (turns, turns * 2):
        try:
            text = _render(tokenizer, messages)
            ids, offsets = _tokens(tokenizer, text)
            begins = _begins(tokenizer, ids, offsets)
            for answer in _answers(tokenizer, messages, text):
                found.append(ids[_stop(tokenizer, ids, begins, answer)])
        except MaskError:
            continue
    return list(dict.fromkeys(found))


def is_served_alike(tokenizer: Any, messages: Sequence[Message]) -> bool:
    """Whether the chat's ids begin with the server's prompt for the last answer.

    False if the tokenizer merges the end of the prompt with the start of the answer, or if the template opens a pending
    answer differently from a given one.
    """
    prompt = encode_prompt(tokenizer, messages[:-1])
    return encode(tokenizer, messages, len(prompt)).input_ids == prompt


def let_control_tokens_be(tokenizer: Any) -> None:
    """From now on, tokenize control tokens in message text as control tokens, for data that is rendered already."""
    tokenizer.control_tokens_in_text = True


def _as_text(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """Return the messages, guarded so that control tokens in their text stay text."""
    if getattr(tokenizer, "control_tokens_in_text", False):
        return list(messages)
    try:
        guarded: list[Message] = _plain_text(tokenizer).guarded(list(messages))
    except ValueError as error:
        raise MaskError(str(error)) from error
    return guarded


@lru_cache(maxsize=4)
def _plain_text(tokenizer: Any) -> PlainText:
    return PlainText(tokenizer)


def _tokens(tokenizer: Any, text: str) -> Piece:
    def tokenize(text: str) -> Piece:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
        return found["input_ids"], found.get("offset_mapping", [])

    plain = _plain_text(tokenizer)
    return plain.tokens(text, tokenize) if plain.is_guarded(text) else tokenize(text)


def _render(tokenizer: Any, messages: list[Message], prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            _bare(messages), tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError) as error:
        raise MaskError(f"the chat template refuses this chat: {error}") from error
    return text


def _bare(messages: list[Message]) -> list[Message]:
    """Return the messages without `weight`, which is not for the template."""
    return [{key: value for key, value in each.items() if key != "weight"} for each in messages]


def _answers(tokenizer: Any, messages: list[Message], text: str) -> list[_Answer]:
    learnt = [
        at
        for at, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1)
    ]
    if not learnt:
        return []
    positions = _positions(tokenizer, messages, text)
    template = tokenizer.get_chat_template()
    spans = _marked_spans(tokenizer, messages, template) if _GENERATION.search(template) else None
    answers = []
    for at in learnt:
        end = _end(positions, at)
        limit = min(
            (found for (other, _), found in positions.items() if other != at and found >= end),
            default=len(text),
        )
        if spans is None:
            own = [(_start(tokenizer, messages, text, at, positions), end)]
        else:
            before = max(
                (_end(positions, i) for i in range(at) if messages[i]["role"] == "assistant"), default=-1
            )
            own = [span for span in spans if before < span[0] <= end]
            if not own:
                continue  # the template marks this answer as not generated
            if not end <= own[-1][1] <= limit:
                raise MaskError(
                    f"message {at + 1}: the chat template's generation marks do not enclose the answer"
                )
        answers.append(_Answer(at + 1, own, end, bool(text[end : own[-1][1]].strip()), limit))
    if not answers:
        raise MaskError("the chat template's generation marks leave out every answer")
    return answers


def _positions(tokenizer: Any, messages: list[Message], text: str) -> dict[tuple[int, int], int]:
    """Return the positions in `text` of the start, the end and the end of the reasoning of each message.

    Parts that the template drops have no position.
    """
    if _MARKER.search(text):
        raise MaskError("the chat has private-use characters from U+F0000 on: remove them from the data")
    # A template that checks a message for a leading tag would not find the tag behind a marker.
    for skip_tags in (False, True):
        marked = [_marked(message, at, skip_tags) for at, message in enumerate(messages)]
        pieces = _MARKER.split(_render(tokenizer, marked))
        if "".join(pieces[::2]) != text:
            continue
        positions: dict[tuple[int, int], int] = {}
        at = 0
        for plain, marker in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            at += len(plain)
            if marker:
                key = divmod(ord(marker) - _FIRST_MARKER, len(_KINDS))
                if key in positions and messages[key[0]]["role"] == "assistant":
                    raise MaskError(f"message {key[0] + 1}: the chat template renders the answer twice")
                positions.setdefault(key, at)
        return positions
    raise MaskError("the text of the chat template depends on how a message begins or ends")


def _marked(message: Message, at: int, skip_tags: bool) -> Message:
    """Return the message with markers inside the surrounding white space of its content, which a template may trim."""
    content = message["content"]
    if not isinstance(content, str):
        raise MaskError(f"message {at + 1}: the content must be text")
    begin = len(content) - len(content.lstrip())
    end = max(begin, len(content.rstrip()))
    tag = _TAG.match(content, begin)
    places = {_END: end}
    if not (skip_tags and tag):
        places[_BEGIN] = begin
    elif message["role"] != "assistant":
        places[_BEGIN] = min(tag.end(), end)
    if message["role"] == "assistant":
        for found in _REASONING_END.finditer(content):
            places[_AFTER_REASONING] = max(begin, min(found.end(), end))
    for kind, place in sorted(places.items(), key=lambda item: (item[1], item[0]), reverse=True):
        marker = chr(_FIRST_MARKER + len(_KINDS) * at + kind)
        content = content[:place] + marker + content[place:]
    return message | {"content": content}


def _end(positions: dict[tuple[int, int], int], at: int) -> int:
    if (at, _END) not in positions:
        raise MaskError(f"message {at + 1}: the chat template drops the end of the answer")
    return positions[at, _END]


def _start(
    tokenizer: Any, messages: list[Message], text: str, at: int, positions: dict[tuple[int, int], int]
) -> int:
    """Return the start of an answer in text without generation marks."""
    prompt = _render(tokenizer, messages[:at], prompt=True)
    if text.startswith(prompt) and len(prompt) <= positions[at, _END]:
        return len(prompt)
    # The template rewrites earlier turns, or opens a pending answer differently: start at the content.
    content = messages[at]["content"]
    if (at, _BEGIN) in positions:
        start, before, after = positions[at, _BEGIN], 0, len(content) - len(content.lstrip())
    elif (at, _AFTER_REASONING) in positions:
        *_, found = _REASONING_END.finditer(content)
        start, before, after = positions[at, _AFTER_REASONING], found.start() + len("</think>"), found.end()
    else:
        raise MaskError(f"message {at + 1}: the chat template drops the beginning of the answer")
    if before < after:  # white space, some of which the template may keep
        bare = messages[at] | {"content": content[:before] + content[after:]}
        start -= len(text) - len(_render(tokenizer, [*messages[:at], bare, *messages[at + 1 :]]))
    return start


def _marked_spans(tokenizer: Any, messages: list[Message], template: str) -> list[tuple[int, int]]:
    """Return the spans of the template's generation marks, in characters of the rendered text."""
    _, spans = render_jinja_template(
        conversations=[_bare(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    found: list[tuple[int, int]] = spans[0]
    return found


def _begins(tokenizer: Any, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """Return the first character of each token, including spaces that some byte-level tokenizers omit from offsets."""
    begins = []
    before = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start > before:
            spelling = tokenizer.convert_ids_to_tokens(token)
            start = max(before, start - (len(spelling) - len(spelling.lstrip("Ġ"))))  # noqa: PLW2901
        begins.append(start)
        before = max(before, end)
    return begins


def _stop(tokenizer: Any, ids: list[int], begins: list[int], answer: _Answer) -> int:
    """Return the index of the stop token of an answer.

    It is the first special token after the answer, or an end token that follows that one directly, as in
    `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`.
    """
    special, stops = _stop_tokens(tokenizer, tokenizer.get_chat_template(), tokenizer.eos_token_id)
    beyond = bisect_left(begins, answer.limit)
    at = bisect_left(begins, answer.end if answer.is_stopped else answer.spans[-1][1])
    while at < beyond and ids[at] not in special:
        at += 1
    if at == beyond or ids[at] not in stops:
        raise MaskError(
            f"message {answer.number}: the chat template ends the answer with no special token of this tokenizer, "
            "so the model would never learn to stop: set a prompt template that ends answers with "
            f"{tokenizer.eos_token or 'the end token'}"
        )
    end = at
    while end < beyond and ids[end] in stops:
        if ids[end] == tokenizer.eos_token_id:
            return end
        end += 1
    return at


@lru_cache(maxsize=4)
def _stop_tokens(tokenizer: Any, template: str, end: int | None) -> tuple[set[int], set[int]]:
    """Return all special tokens, and those that may end an answer: not those that open a text or a turn."""
    question = [{"role": "user", "content": "?"}]
    asked = tokenizer(_render(tokenizer, question), add_special_tokens=False)["input_ids"]
    prompt = encode_prompt(tokenizer, question)
    shared = next(
        (at for at, pair in enumerate(zip(asked, prompt, strict=False)) if pair[0] != pair[1]), len(asked)
    )
    # Some vocabularies have white space and line breaks as added tokens.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if str(added).strip()}
    openers = {*prompt[shared:], tokenizer.bos_token_id}
    return special, {token for token in special if token == end or token not in openers}
