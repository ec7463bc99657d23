from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.models.golden import golden_prompts

ROWS = [
    {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "…"}]}
    for n in range(30)
]


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_dir / "models" / "tiny")


@pytest.fixture
def model(tiny_dir: Path) -> Any:
    """The tiny base with a random adapter that changes every layer."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_dir / "models" / "tiny")
    return get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))


def scores(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


def test_scores_equal_those_of_a_plain_forward_pass(model: Any, tokenizer: Any) -> None:
    for golden in golden_prompts(model, tokenizer, ROWS, 8, 16, stops=[2]):
        adapted = scores(model, golden.prompt_token_ids, golden.token_ids)
        with model.disable_adapter():
            plain = scores(model, golden.prompt_token_ids, golden.token_ids)
        at = range(len(golden.token_ids)), golden.token_ids
        torch.testing.assert_close(adapted[at], torch.tensor(golden.logprobs).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(plain[at], torch.tensor(golden.base_logprobs).double(), atol=1e-4, rtol=0)
        assert adapted.argmax(-1).tolist() == golden.token_ids
        assert golden.logprobs != golden.base_logprobs


def test_other_prompts_change_nothing(model: Any, tokenizer: Any) -> None:
    many = golden_prompts(model, tokenizer, ROWS[:8], 8, 16, stops=[2])
    alone = [golden_prompts(model, tokenizer, [row], 8, 16, stops=[2])[0] for row in ROWS[:8]]
    assert many == alone


def test_prompts_are_distinct_and_evenly_spaced(model: Any, tokenizer: Any) -> None:
    prompts = golden_prompts(model, tokenizer, ROWS * 2, 10, 1, stops=[2])
    assert [p.messages[-1]["content"] for p in prompts] == [f"question {n}" for n in range(0, 30, 3)]


def test_dropout_is_off(tiny_dir: Path, tokenizer: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_dir / "models" / "tiny")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(base, config).train()
    assert golden_prompts(model, tokenizer, ROWS, 8, 8, stops=[2]) == golden_prompts(
        model, tokenizer, ROWS, 8, 8, stops=[2]
    )


def test_answers_end_with_a_stop_token_or_at_the_limit(model: Any, tokenizer: Any) -> None:
    (cut,) = golden_prompts(model, tokenizer, ROWS[:1], 8, 6, stops=[2])
    assert len(cut.token_ids) == 6
    (stopped,) = golden_prompts(
        model, tokenizer, ROWS[:1], 8, 6, stops=[cut.token_ids[2], tokenizer.eos_token_id]
    )
    assert stopped.token_ids == cut.token_ids[: cut.token_ids.index(cut.token_ids[2]) + 1]


def test_generation_config_of_the_base_is_ignored(model: Any, tokenizer: Any) -> None:
    before = golden_prompts(model, tokenizer, ROWS[:2], 8, 12, stops=[2])
    model.generation_config.update(repetition_penalty=5.0, suppress_tokens=before[0].token_ids)
    assert golden_prompts(model, tokenizer, ROWS[:2], 8, 12, stops=[2]) == before
