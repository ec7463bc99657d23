"""New words for a tokenizer, each as one token, and rows for them in the model's embeddings."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from training.errors import ConfigError

log = logging.getLogger(__name__)

Pieces = dict[int, list[int]]
"""New token ids, and the ids of the pieces that stood for each until now."""


def add_tokens(tokenizer: Any, words: Sequence[str]) -> Pieces:
    """Teach the tokenizer those words that are not one token already, which are named in the log.

    Raises ConfigError if it knows them all.
    """
    pieces = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
    new = [word for word, ids in pieces.items() if len(ids) > 1]
    if known := [word for word in words if word not in new]:
        log.warning(
            "%d of %d new tokens are tokens of the base model already, such as %s",
            len(known), len(words), known[0],
        )  # fmt: skip
    if words and not new:
        raise ConfigError("new_tokens: each of them is a token of the base model already: leave it out")
    tokenizer.add_tokens(new)
    return {tokenizer.convert_tokens_to_ids(word): pieces[word] for word in new}


@torch.no_grad()
def make_room(model: Any, pieces: Pieces) -> None:
    """Give each new token a row in the embeddings: the mean of those of its pieces, which is close to what the
    model made of the word before."""
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(max(rows, max(pieces) + 1), mean_resizing=False)
    # It is that one no more: PEFT would compare their sizes, and save more than was learnt.
    model.name_or_path = ""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    for weight in {id(side.weight): side.weight for side in both}.values():  # one, where they are tied
        for token, ids in pieces.items():
            weight[token] = weight[ids].float().mean(0).to(weight.dtype)
