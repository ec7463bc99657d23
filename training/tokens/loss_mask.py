"""Chats as token ids, and which of them carry loss: the assistant's answers and the tokens that stop them.

Exact for any chat template, or an error. Where a template marks what is generated, the marks say where an answer
begins and ends. Else an answer begins where the prompt ends that a server renders for it. Markers put into the
contents, and taken out again, show where each message lies in the rendered text; offsets of the fast tokenizer lead
from there to tokens. A token belongs to an answer if it begins in it: one that begins in the prompt and
reaches into the answer is part of what a server is given, and carries no loss.

What carries loss is what the template shows. Of an answer whose reasoning it drops once other turns follow,
that is the rest; where it puts an empty reasoning block after the prompt, the block too.
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

# Markers are private characters, which no template cuts, trims or changes: one number for each message and kind.
_FIRST_MARKER = 0xF0000
_MARKER = re.compile("([\U000f0000-\U000ffffd])")
_KINDS = _BEGIN, _AFTER_REASONING, _END = range(3)

_TAG = re.compile(r"<[^<>\s]*>\s*")
_REASONING_END = re.compile(r"</think>\s*")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class MaskError(ValueError):
    """A chat whose answers cannot be found exactly in its tokens. The message says what is in the way."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One chat as the model sees it."""

    input_ids: list[int]
    """Exactly those of `tokenizer.apply_chat_template`, up to max_length."""
    loss_mask: list[int]
    """1 on every token that carries loss, else 0; as long as input_ids."""
    is_cut: bool
    """Did max_length cut tokens off the end?"""


@dataclass(frozen=True, slots=True)
class _Answer:
    """Where an answer lies in the rendered text, in characters."""

    number: int
    """Of the message, from 1."""
    spans: list[tuple[int, int]]
    end: int
    """Where its content ends."""
    is_stopped: bool
    """Do the spans hold the stop token already?"""
    limit: int
    """Where the next message begins; a stop token stands before it."""


def encode(tokenizer: Any, messages: Sequence[Message], max_length: int | None = None) -> Encoded:
    """The chat's token ids, with loss on the assistant's answers and their stop tokens.

    An answer of `"weight": 0` carries none. Raises MaskError if the template cannot render the chat, hides where
    an answer lies, or ends one without a stop token.
    """
    if not tokenizer.is_fast:
        raise MaskError("the tokenizer is not a fast one: give the base model a tokenizer.json")
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
    """The ids that a server gives the model to answer: the chat and the opening of the assistant's turn."""
    return _tokens(tokenizer, _render(tokenizer, _as_text(tokenizer, messages), prompt=True))[0]


def encode_chat(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The ids of a whole chat, with whatever the template puts after the last message."""
    return _tokens(tokenizer, _render(tokenizer, _as_text(tokenizer, messages)))[0]


def template_stops(tokenizer: Any) -> list[int]:
    """The tokens with which the chat template ends an answer, inside a chat and at its end: those that are learnt.

    Empty where the template ends answers with no special token, or shows a chat so that none can be found.
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
    """Do the chat's ids begin with those that a server gives the model for the last answer?

    Not so where the tokenizer merges the end of the prompt with the start of the answer, or where the
    template opens an answer to come in other words than one that is there.
    """
    prompt = encode_prompt(tokenizer, messages[:-1])
    return encode(tokenizer, messages, len(prompt)).input_ids == prompt


def let_control_tokens_be(tokenizer: Any) -> None:
    """From now on, a control token in the text of a message is one, as where data was rendered before."""
    tokenizer.control_tokens_in_text = True


def _as_text(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The messages, in which text stays text."""
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
    """What a template is to see: all but our own `weight`."""
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
                continue  # the template says that this one is not generated
            if not end <= own[-1][1] <= limit:
                raise MaskError(
                    f"message {at + 1}: the chat template's generation marks do not enclose the answer"
                )
        answers.append(_Answer(at + 1, own, end, bool(text[end : own[-1][1]].strip()), limit))
    if not answers:
        raise MaskError("the chat template's generation marks leave out every answer")
    return answers


def _positions(tokenizer: Any, messages: list[Message], text: str) -> dict[tuple[int, int], int]:
    """Where the begin, the end and the end of the reasoning of each message stand in `text`.

    What the template leaves out has none.
    """
    if _MARKER.search(text):
        raise MaskError("the chat has private-use characters from U+F0000 on: take them out of the data")
    # A template may look for a tag at the beginning of a message, and so not find it behind a marker.
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
                    raise MaskError(f"message {key[0] + 1}: the chat template shows the answer twice")
                positions.setdefault(key, at)
        return positions
    raise MaskError("the chat template changes its own words with how a message begins or ends")


def _marked(message: Message, at: int, skip_tags: bool) -> Message:
    """The message with markers inside the white space around its content, which a template may trim."""
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
        raise MaskError(f"message {at + 1}: the chat template leaves out the end of the answer")
    return positions[at, _END]


def _start(
    tokenizer: Any, messages: list[Message], text: str, at: int, positions: dict[tuple[int, int], int]
) -> int:
    """Where the answer begins in a text without generation marks."""
    prompt = _render(tokenizer, messages[:at], prompt=True)
    if text.startswith(prompt) and len(prompt) <= positions[at, _END]:
        return len(prompt)
    # The template rewrites earlier turns, or opens an answer to come in other words: begin with the content.
    content = messages[at]["content"]
    if (at, _BEGIN) in positions:
        start, before, after = positions[at, _BEGIN], 0, len(content) - len(content.lstrip())
    elif (at, _AFTER_REASONING) in positions:
        *_, found = _REASONING_END.finditer(content)
        start, before, after = positions[at, _AFTER_REASONING], found.start() + len("</think>"), found.end()
    else:
        raise MaskError(f"message {at + 1}: the chat template leaves out the beginning of the answer")
    if before < after:  # white space, of which the template keeps perhaps some
        bare = messages[at] | {"content": content[:before] + content[after:]}
        start -= len(text) - len(_render(tokenizer, [*messages[:at], bare, *messages[at + 1 :]]))
    return start


def _marked_spans(tokenizer: Any, messages: list[Message], template: str) -> list[tuple[int, int]]:
    """What the template's own generation marks enclose, in characters of the rendered text."""
    _, spans = render_jinja_template(
        conversations=[_bare(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    found: list[tuple[int, int]] = spans[0]
    return found


def _begins(tokenizer: Any, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """The character each token begins at, with the spaces that some byte-level tokenizers leave out of offsets."""
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
    """The token that ends the answer: the first special one after it, or the end token that follows that one
    directly, as in `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`."""
    special, stops = _stop_tokens(tokenizer, tokenizer.get_chat_template(), tokenizer.eos_token_id)
    beyond = bisect_left(begins, answer.limit)
    at = bisect_left(begins, answer.end if answer.is_stopped else answer.spans[-1][1])
    while at < beyond and ids[at] not in special:
        at += 1
    if at == beyond or ids[at] not in stops:
        raise MaskError(
            f"message {answer.number}: the chat template ends the answer with no special token of this tokenizer, "
            "so that the model would never learn to stop; set a prompt template that ends answers with "
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
    """All special tokens, and those that may end an answer: not the ones that open a text or the next turn."""
    question = [{"role": "user", "content": "?"}]
    asked = tokenizer(_render(tokenizer, question), add_special_tokens=False)["input_ids"]
    prompt = encode_prompt(tokenizer, question)
    shared = next(
        (at for at, pair in enumerate(zip(asked, prompt, strict=False)) if pair[0] != pair[1]), len(asked)
    )
    # Some vocabularies hold white space and line breaks as added tokens.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if str(added).strip()}
    openers = {*prompt[shared:], tokenizer.bos_token_id}
    return special, {token for token in special if token == end or token not in openers}
