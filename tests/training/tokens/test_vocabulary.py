from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.errors import ConfigError
from training.tokens.vocabulary import add_tokens, make_room

WORDS = ["阿莫西林", "高血压病", "metformin"]


@pytest.fixture
def tokenizer(tiny_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_dir / "models" / "tiny")


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_new_token_is_initialized_to_the_mean_of_its_pieces(
    tiny_dir: Path, tokenizer: Any, is_tied: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir / "models" / "tiny", tie_word_embeddings=is_tied)
    before = [side.weight.detach().clone() for side in sides(model)]
    old = {word: tokenizer(word).input_ids for word in WORDS}
    pieces = add_tokens(tokenizer, WORDS)
    make_room(model, pieces)
    assert [tokenizer(word).input_ids for word in WORDS] == [[token] for token in pieces]
    assert list(pieces.values()) == [old[word] for word in WORDS]
    for side, was in zip(sides(model), before, strict=True):
        assert len(side.weight) == max(len(was), len(tokenizer))
        for token, ids in pieces.items():
            torch.testing.assert_close(side.weight[token], was[ids].mean(0))
        untouched = [token for token in range(len(was)) if token not in pieces]
        assert torch.equal(side.weight[untouched], was[untouched])
    assert (sides(model)[0].weight is sides(model)[1].weight) == is_tied


def sides(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def test_a_new_word_in_a_text_is_one_token(tokenizer: Any) -> None:
    text = "口服阿莫西林，一日三次"
    (token,) = add_tokens(tokenizer, WORDS[:1])
    ids = tokenizer(text).input_ids
    assert token in ids
    assert tokenizer.decode(ids) == text


def test_words_that_are_already_tokens_are_logged(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert len(add_tokens(tokenizer, ["a", *WORDS])) == len(WORDS)
    assert "1 of 4 new tokens are already tokens of the base model, such as a" in caplog.text
    with pytest.raises(ConfigError, match="all of them are already tokens of the base model"):
        add_tokens(tokenizer, ["a", "b"])
    assert add_tokens(tokenizer, []) == {}
