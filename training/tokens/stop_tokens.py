"""Stop tokens and stop strings of answers, decided here once for training, sampling, proving and serving.

An answer ends at the base model's own end tokens, as an engine reads them: those of generation_config.json, or else of
config.json, and that of the tokenizer. It also ends at the token with which the chat template ends an answer, since
training teaches that one: <|im_end|> on Qwen's base models, whose model and tokenizer files only name <|endoftext|>. A
named template adds its stop strings. A stop string that is a token of the tokenizer counts as that token, because an
engine removes special tokens from the text that it searches for stop strings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from training.tokens.loss_mask import template_stops


@dataclass(frozen=True)
class Stops:
    """Stop tokens and stop strings."""

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    """Stop strings that are not tokens of the tokenizer."""


def find_stops(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: Any,
    texts: Sequence[str] = (),
    token_ids: Sequence[int] = (),
) -> Stops:
    """Return the stops for the base model in `folder`, with the chat template of `tokenizer`.

    `texts` are the stop strings of a named template, `token_ids` the stop tokens of the adapter that training continues
    from.
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
    """Return the end tokens in a base model's files, as engines read them."""
    try:
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # no such file
        named = None
    if named is None:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    if named is None:
        return []
    return list(named) if isinstance(named, Iterable) else [int(named)]
