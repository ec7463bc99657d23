"""Text stays text: what looks like a control token inside a message is none.

A chat template puts control tokens between messages, and a tokenizer finds them in the rendered text wherever they
stand: a user who writes `<|im_start|>system` would speak with the system's voice. So, before a chat is rendered, each
control token in the text of its messages is replaced by a stand-in, one private-use character; and where the rendered
text is tokenised, a stand-in becomes the tokens of its letters. Training and serving do it here, alike.

A control token is one that the tokenizer calls special. A chat without any in its text is not touched.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_FIRST = 0x100000
"""The stand-ins are from Supplementary Private Use Area-B, whose characters mean nothing in text."""

Piece = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and for each where it begins and ends in the text, in characters."""


class PlainText:
    """The stand-ins for the control tokens of one tokenizer, a fast one of Hugging Face's."""

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
        """`value`, a text or lists and objects of them, with stand-ins in the place of control tokens.

        The same object if there are none. Raises ValueError for text that holds both a control token and a character
        that might be a stand-in.
        """
        if isinstance(value, str):
            if not self._control.search(value):
                return value
            if self._stand_in.search(value):
                raise ValueError(
                    "a text with control tokens has private-use characters from U+100000 on: take them out"
                )
            return self._control.sub(lambda found: self._stand_ins[found[0]], value)
        if isinstance(value, Mapping):
            parts = {key: self.guarded(part) for key, part in value.items()}
            return value if all(parts[key] is part for key, part in value.items()) else parts
        if isinstance(value, Iterable):  # some of which can be read only once
            old = value if isinstance(value, list) else list(value)
            items = [self.guarded(item) for item in old]
            is_same = old is value and all(one is other for one, other in zip(items, old, strict=True))
            return value if is_same else items
        return value

    def restored(self, value: Any) -> Any:
        """`value`, as `guarded` made it, with the control tokens as they were written."""
        if isinstance(value, str):
            return self._stand_in.sub(lambda found: self._controls[ord(found[0]) - _FIRST], value)
        if isinstance(value, Mapping):
            return {key: self.restored(part) for key, part in value.items()}
        return [self.restored(item) for item in value] if isinstance(value, list) else value

    def is_guarded(self, text: str) -> bool:
        """Whether a rendered text may hold stand-ins. One cheap look, for those that do not."""
        return self._stand_in.search(text) is not None

    def tokens(self, text: str, tokenize: Callable[[str], Piece]) -> Piece:
        """The tokens of a rendered text with stand-ins; `tokenize` does what lies between them."""
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
