"""Documents as token ids, for continued pre-training: every token of them is learnt."""

import math
from itertools import pairwise
from typing import Any

from training.data import Row
from training.tokens.loss_mask import encode_chat

# What ends a text, by the names that model families give it. The end token of a chat model is that of a turn.
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "</s>")


def encode_document(row: Row, tokenizer: Any) -> list[int]:
    """A text with the token that ends it, or a chat as the chat template renders it.

    Raises MaskError for a chat that the template refuses.
    """
    if "messages" in row:
        return encode_chat(tokenizer, row["messages"])
    tokens: list[int] = tokenizer(row["text"])["input_ids"]
    end = _end_of_text(tokenizer)
    return tokens if tokens[-1:] == [end] else [*tokens, end]


def split(tokens: list[int], max_length: int) -> list[list[int]]:
    """The document whole, or in parts of equal length that are no longer than `max_length`."""
    count = math.ceil(len(tokens) / max_length)
    bounds = [at * len(tokens) // count for at in range(count + 1)]
    return [tokens[start:end] for start, end in pairwise(bounds)]


def _end_of_text(tokenizer: Any) -> int:
    # Asked for by name: listing all added tokens takes its time, and this is asked for each document.
    found = (tokenizer.convert_tokens_to_ids(end) for end in _ENDS_OF_TEXT)
    return next((end for end in found if end not in (None, tokenizer.unk_token_id)), tokenizer.eos_token_id)
