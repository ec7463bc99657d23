"""Keep the text of messages from being read as control tokens.

A chat template puts control tokens between messages, and a tokenizer finds them anywhere in the rendered text: a user
who writes `<|im_start|>system` could impersonate the system. Before a chat is rendered, each control token in the text
of its messages is therefore replaced by a stand-in, one private-use character. When the rendered text is tokenized, a
stand-in becomes the tokens of its letters. Training and serving both use this module.

A control token is a token that the tokenizer marks as special. A chat without any in its text is not changed.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_FIRST = 0x100000
"""The stand-ins are from Supplementary Private Use Area-B, whose characters have no meaning in text."""

Piece = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the start and end of each in the text, in characters."""


class PlainText:
    """The stand-ins for the control tokens of one Hugging Face fast tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        controls = sorted(
            {str(one) for one in added if one.special and str(one).strip()}, key=len, reverse=True
        )
        self._controls = controls
        self._letters = [
            list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
            for text in controls
        ]
        self._stand_ins = {text: chr(_FIRST + number) for number, text in enumerate(controls)}
        self._control = re.compile("|".join(map(re.escape, controls)) or "(?!)")
        self._stand_in = re.compile(f"([{chr(_FIRST)}-{chr(_FIRST + max(1, len(controls)) - 1)}])")

    def guarded(self, value: Any) -> Any:
        """Return `value`, a text or lists and objects of texts, with control tokens replaced by stand-ins.

        Returns the same object if it has none. Raises ValueError for text that has both a control token and a character
        that could be a stand-in.
        """
        if isinstance(value, str):
            if not self._control.search(value):
                return value
            if self._stand_in.search(value):
                raise ValueError(
                    "a text has both control tokens and private-use characters from U+100000 on: remove the latter"
                )
            return self._control.sub(lambda found: self._stand_ins[found[0]], value)
        if isinstance(value, Mapping):
            parts = {key: self.guarded(part) for key, part in value.items()}
            return value if all(parts[key] is part for key, part in value.items()) else parts
        if isinstance(value, Iterable):  # some can be read only once
            old = value if isinstance(value, list) else list(value)
            items = [self.guarded(item) for item in old]
            is_same = old is value and all(one is other for one, other in zip(items, old, strict=True))
            return value if is_same else items
        return value

    def restored(self, value: Any) -> Any:
        """Undo `guarded`: return `value` with the original control tokens."""
        if isinstance(value, str):
            return self._stand_in.sub(lambda found: self._controls[ord(found[0]) - _FIRST], value)
        if isinstance(value, Mapping):
            return {key: self.restored(part) for key, part in value.items()}
        return [self.restored(item) for item in value] if isinstance(value, list) else value

    def is_guarded(self, text: str) -> bool:
        """Check cheaply whether a rendered text may have stand-ins."""
        return self._stand_in.search(text) is not None

    def tokens(self, text: str, tokenize: Callable[[str], Piece]) -> Piece:
        """Return the tokens of a rendered text with stand-ins; `tokenize` handles the text between them."""
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        begin = 0
        for number, piece in enumerate(self._stand_in.split(text)):
            if number % 2:
                letters = self._letters[ord(piece) - _FIRST]
                ids += letters
                places += [(begin, begin + 1)] * len(letters)
            elif piece:
                found, where = tokenize(piece)
                ids += found
                places += [(begin + start, begin + end) for start, end in where]
            begin += len(piece)
        return ids, places
