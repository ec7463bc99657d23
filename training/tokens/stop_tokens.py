"""What ends an answer: decided here, once, for all that is learnt, sampled, proved and served.

An answer ends at what the base model itself stops at, as an engine reads it: the end tokens of
generation_config.json, or else of config.json, and the tokenizer's own. It also ends at the token with which the chat
template ends an answer, since that is what training teaches: on Qwen's base models <|im_end|>, while the model and
its tokenizer know <|endoftext|> alone. A named template has its stop texts. One that is a token of the tokenizer
counts as that token: an engine takes special tokens out of the text in which it looks for texts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from training.tokens.loss_mask import template_stops


@dataclass(frozen=True)
class Stops:
    """What ends an answer."""

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    """Those that are no token of the tokenizer."""


def find_stops(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: Any,
    texts: Sequence[str] = (),
    token_ids: Sequence[int] = (),
) -> Stops:
    """What ends an answer of the base model in `folder`, with the chat template that its `tokenizer` holds.

    `texts` are those of a named template, `token_ids` those of the adapter that training goes on with.
    """
    of_tokenizer = tokenizer.get_added_vocab()
    found = [
        *model_stops(folder, config),
        tokenizer.eos_token_id,
        *(template_stops(tokenizer) if tokenizer.chat_template is not None else ()),
        *(of_tokenizer[text] for text in texts if text in of_tokenizer),
        *token_ids,
    ]
    return Stops(
        tuple(dict.fromkeys(token for token in found if token is not None)),
        tuple(text for text in texts if text not in of_tokenizer),
    )


def model_stops(folder: Path, config: PreTrainedConfig) -> list[int]:
    """The end tokens that a base model's files name, as engines read them."""
    try:
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # there is no such file
        named = None
    if named is None:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    if named is None:
        return []
    return list(named) if isinstance(named, Iterable) else [int(named)]
