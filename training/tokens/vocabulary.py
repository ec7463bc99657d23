"""Adds words to a tokenizer as one token each, and rows for them to the model's embeddings."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from training.errors import ConfigError

log = logging.getLogger(__name__)

Pieces = dict[int, list[int]]
"""New token ids, each with the ids of the tokens that it replaces."""


def add_tokens(tokenizer: Any, words: Sequence[str]) -> Pieces:
    """Add the words that are not single tokens yet; log how many are.

    Raises ConfigError if all of them are tokens already.
    """
    pieces = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
    new = [word for word, ids in pieces.items() if len(ids) > 1]
    if known := [word for word in words if word not in new]:
        log.warning(
            "%d of %d new tokens are already tokens of the base model, such as %s",
            len(known), len(words), known[0],
        )  # fmt: skip
    if words and not new:
        raise ConfigError("new_tokens: all of them are already tokens of the base model: remove this setting")
    tokenizer.add_tokens(new)
    return {tokenizer.convert_tokens_to_ids(word): pieces[word] for word in new}


@torch.no_grad()
def make_room(model: Any, pieces: Pieces) -> None:
    """Add an embedding row for each new token: the mean of the rows of its pieces, close to how the model represented
    the word before."""
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(max(rows, max(pieces) + 1), mean_resizing=False)
    # Unset the name: PEFT would compare vocabulary sizes with the named model and save all embeddings.
    model.name_or_path = ""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    for weight in {id(side.weight): side.weight for side in both}.values():  # a single one if they are tied
        for token, ids in pieces.items():
            weight[token] = weight[ids].float().mean(0).to(weight.dtype)
