"""Tokenization of documents for continued pre-training, where every token has loss."""

import math
from itertools import pairwise
from typing import Any

from training.data import Row
from training.tokens.loss_mask import encode_chat

# Names of the end-of-text token in various model families. The end token of a chat model ends a turn, not a text.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "</s>")


def encode_document(row: Row, tokenizer: Any) -> list[int]:
    """Return the token ids of a text with its end-of-text token, or of a chat rendered with the chat template.

    Raises MaskError for a chat that the template refuses.
    """
    if "messages" in row:
        return encode_chat(tokenizer, row["messages"])
    tokens: list[int] = tokenizer(row["text"])["input_ids"]
    end = _end_of_text(tokenizer)
    return tokens if tokens[-1:] == [end] else [*tokens, end]


def split(tokens: list[int], max_length: int) -> list[list[int]]:
    """Split a document into parts of about equal length, none longer than `max_length`."""
    count = math.ceil(len(tokens) / max_length)
    bounds = [at * len(tokens) // count for at in range(count + 1)]
    return [tokens[start:end] for start, end in pairwise(bounds)]


def _end_of_text(tokenizer: Any) -> int:
    # Look up by name: listing all added tokens is slow, and this runs once per document.
    found = (tokenizer.convert_tokens_to_ids(end) for end in _ENDS_OF_TEXT)
    return next((end for end in found if end not in (None, tokenizer.unk_token_id)), tokenizer.eos_token_id)
