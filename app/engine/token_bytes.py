"""The bytes of a token, of which a character may need several: what its text cannot say."""

import json
import re
from functools import cache, lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@cache
def _letters() -> dict[str, int]:
    """Byte-level tokenizers write each byte as one printable character (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


class TokenBytes:
    """Of one tokenizer, a fast one of Hugging Face's."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend else ""
        self._is_byte_level = '"ByteLevel"' in decoder
        self._falls_back = '"ByteFallback"' in decoder
        self._added = {token_id: text for text, token_id in tokenizer.get_added_vocab().items()}
        self._tokenizer = tokenizer

    def of(self, token_id: int) -> bytes | None:
        """None of a kind of tokenizer that does not write bytes."""
        if token_id in self._added:
            return self._added[token_id].encode()
        text = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._is_byte_level and text is not None:
            letters = _letters()
            return bytes(letters[letter] for letter in text) if all(map(letters.__contains__, text)) else None
        if self._falls_back and text is not None:
            found = _BYTE.fullmatch(text)
            return bytes([int(found[1], 16)]) if found else text.replace("▁", " ").encode()
        return None


@lru_cache(maxsize=16)
def token_bytes(tokenizer: Any) -> TokenBytes:
    """Made once for each tokenizer."""
    return TokenBytes(tokenizer)
