"""What ends an adapter's answers, as an engine can act on it."""

from collections.abc import Mapping, Sequence

from app.errors import AdapterRefused


def resolved(
    name: str, texts: Sequence[str], token_ids: Sequence[int], known: Mapping[str, int], vocabulary: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The texts and tokens that end the answers of the adapter `name`.

    A text that is one of the tokens that the tokenizer was given (`known`) counts as that token: engines look for
    texts in what they have taken special tokens out of. Raises AdapterRefused for a token that is not among the
    `vocabulary` of the base model: an engine takes it for an error of each request.
    """
    tokens = dict.fromkeys([*token_ids, *(known[text] for text in texts if text in known)])
    for token in tokens:
        if token >= vocabulary:
            raise AdapterRefused(
                f"{name} is refused: its answers end with token {token}, and the base model has {vocabulary} tokens: "
                "it was trained on another one"
            )
    return tuple(text for text in texts if text not in known), tuple(tokens)
