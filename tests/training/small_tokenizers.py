"""Small fast tokenizers of the two families that matter: byte-level BPE, and SentencePiece-like BPE."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXTS = [
    "感冒了怎么办？多休息，多喝水。如有不适请及时就医。头痛发热三天了。",
    "What helps against a cold? Rest, and drink plenty of water. See a doctor if it lasts.",
    "### Instruction:\n### Response:\nUSER: ASSISTANT: Human: User: Assistant: [INST] [/INST] 问题:\n回答：\n",
    "系统 system user assistant model You are a helpful assistant. 你是一位医生。 <think>\n\n</think>\n\n",
] * 3
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def byte_level(
    *, special: Sequence[str] = SPECIAL, trim_offsets: bool = False, vocab_size: int = 700, **names: Any
) -> Any:
    """As Qwen, Llama 3 and Bloom have; `names` are eos_token, bos_token, chat_template and so on."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_roles(names))


def sentence_piece(*, special: Sequence[str] = SPECIAL, prefix_space: bool = True, **names: Any) -> Any:
    """As Llama 2, Mistral and Baichuan have: a space is part of the next word, and unknown letters are bytes.

    `prefix_space` puts a space before what follows a special token, as Llama 2 does.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *special],
        show_progress=False,
        max_token_length=6,
    )
    # No token holds a line break, nor a space elsewhere than at its start.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    saved = json.loads(tokenizer.to_str())
    vocabulary = saved["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_roles(names))


def _roles(names: dict[str, Any]) -> dict[str, Any]:
    return {
        "eos_token": "</s>",
        "bos_token": "<s>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    } | names
