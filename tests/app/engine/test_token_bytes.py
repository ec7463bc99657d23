"""The bytes of tokens, which joined are the bytes of the text."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from app.engine.token_bytes import TokenBytes
from tests.training.small_tokenizers import byte_level

TEXTS = ["阿司匹林 100 mg, é 🙂\n\tx", "plain text", "<|im_end|> a"]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level(text: str) -> None:
    tokenizer = byte_level(special=("<|im_end|>",))
    of_token = TokenBytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(of_token.of(token) or b"" for token in ids) == text.encode()


def test_byte_fallback() -> None:
    vocabulary = {"<unk>": 0, "▁a": 1, "<0xE9>": 2, "<0x98>": 3, "<0xBF>": 4, "b▁": 5}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    of_token = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert b"".join(of_token.of(token) or b"" for token in (1, 2, 3, 4, 5)) == " a阿b ".encode()


def test_other_kinds_of_tokenizers_return_none() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    assert TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend)).of(0) is None
