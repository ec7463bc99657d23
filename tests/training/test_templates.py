from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from training.templates import prompt_completion

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "感冒？"},
    {"role": "assistant", "content": "多休息。"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_dir / "models" / "tiny")


def test_the_template_is_chatml(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\n感冒？<|im_end|>\n"
        "<|im_start|>assistant\n多休息。<|im_end|>\n"
    )


def test_a_prompt_for_generation_is_what_training_saw_before_the_answer(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole == prompt + "多休息。<|im_end|>\n"


def test_answer_and_stop_token_are_marked_and_nothing_else(tokenizer: Any) -> None:
    found = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    marked = [t for t, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "多休息。<|im_end|>"


def test_special_tokens_are_one_token_each(tokenizer: Any) -> None:
    assert [len(tokenizer(t).input_ids) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")] == [1, 1, 1]


def test_a_row_splits_before_its_last_answer() -> None:
    assert prompt_completion({"messages": CHAT}) == {"prompt": CHAT[:2], "completion": CHAT[2:]}
