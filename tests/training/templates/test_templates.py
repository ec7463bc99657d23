"""Golden text of every named template. It must never change, since published adapters were trained with it."""

from typing import Any

import pytest

from tests.training.small_tokenizers import SPECIAL, byte_level, sentence_piece
from training.templates import CHAT_TEMPLATE, NAMES, named
from training.tokens.loss_mask import encode, is_served_alike

SYSTEM = {"role": "system", "content": "你是一位医生。"}
TURNS = [
    {"role": "user", "content": "头痛三天了"},
    {"role": "assistant", "content": "多休息。"},
    {"role": "user", "content": "What else?"},
    {"role": "assistant", "content": "Drink water."},
]

# Of each template: a chat of two turns with a system message, and what stands before the answer of one without.
GOLDEN = {
    "alpaca": (
        "<s>你是一位医生。\n\n### Instruction:\n头痛三天了\n\n### Response:\n多休息。</s>\n\n"
        "### Instruction:\nWhat else?\n\n### Response:\nDrink water.</s>",
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n头痛三天了\n\n### Response:\n",
    ),
    "baichuan": (
        "你是一位医生。<reserved_102>头痛三天了<reserved_103>多休息。</s>"
        "<reserved_102>What else?<reserved_103>Drink water.</s>",
        "<reserved_102>头痛三天了<reserved_103>",
    ),
    "baichuan2": (
        "你是一位医生。<reserved_106>头痛三天了<reserved_107>多休息。</s>"
        "<reserved_106>What else?<reserved_107>Drink water.</s>",
        "<reserved_106>头痛三天了<reserved_107>",
    ),
    "bentsao-bloom": (
        "你是一位医生。\n头痛三天了\n### 回答：\n多休息。</s>\nWhat else?\n### 回答：\nDrink water.</s>",
        "下面是一个问题，运用医学知识来正确回答提问.\n头痛三天了\n### 回答：\n",
    ),
    "bentsao-literature": (
        "<s>你是一位医生。\n\n ### 说明:\n <user>: 头痛三天了 <bot>: 多休息。 <user>: What else?\n\n"
        "### 回复:\nDrink water.</s>",
        "<s>以下是描述任务的说明，编写适当地回复完成请求的响应。\n\n ### 说明:\n <user>: 头痛三天了\n\n### 回复:\n",
    ),
    "bentsao-med": (
        "<s>你是一位医生。\n### 问题:\n头痛三天了\n### 回答:\n多休息。</s>\n"
        "### 问题:\nWhat else?\n### 回答:\nDrink water.</s>",
        "<s>下面是一个问题，运用医学知识来正确回答提问.\n### 问题:\n头痛三天了\n### 回答:\n",
    ),
    "chatml": (
        "<|im_start|>system\n你是一位医生。<|im_end|>\n<|im_start|>user\n头痛三天了<|im_end|>\n"
        "<|im_start|>assistant\n多休息。<|im_end|>\n<|im_start|>user\nWhat else?<|im_end|>\n"
        "<|im_start|>assistant\nDrink water.<|im_end|>\n",
        "<|im_start|>user\n头痛三天了<|im_end|>\n<|im_start|>assistant\n",
    ),
    "deepseek": (
        "<s>你是一位医生。\n\nUser: 头痛三天了\n\nAssistant: 多休息。</s>"
        "User: What else?\n\nAssistant: Drink water.</s>",
        "<s>User: 头痛三天了\n\nAssistant:",
    ),
    "huatuo": (
        "你是一位医生。<病人>：头痛三天了 <HuatuoGPT>：多休息。</s><病人>：What else? <HuatuoGPT>：Drink water.</s>",
        "一位用户和智能医疗大模型HuatuoGPT之间的对话。对于用户的医疗问诊，HuatuoGPT给出准确的、详细的、温暖的"
        "指导建议。对于用户的指令问题，HuatuoGPT给出有益的、详细的、有礼貌的回答。<病人>：头痛三天了 <HuatuoGPT>：",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\n你是一位医生。\n<</SYS>>\n\n头痛三天了 [/INST] 多休息。</s>"
        "<s>[INST] What else? [/INST] Drink water.</s>",
        "<s>[INST] 头痛三天了 [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\n你是一位医生。<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n头痛三天了<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n多休息。<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat else?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nDrink water.<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\n头痛三天了<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s>[INST] 你是一位医生。\n\n头痛三天了 [/INST] 多休息。</s>[INST] What else? [/INST] Drink water.</s>",
        "<s>[INST] 头痛三天了 [/INST]",
    ),
    "orion": (
        "<s>你是一位医生。\n\nHuman: 头痛三天了\n\nAssistant: </s>多休息。</s>"
        "Human: What else?\n\nAssistant: </s>Drink water.</s>",
        "<s>Human: 头痛三天了\n\nAssistant: </s>",
    ),
    "phoenix": (
        "你是一位医生。\n\nHuman: <s>头痛三天了</s>Assistant: <s>多休息。</s>"
        "Human: <s>What else?</s>Assistant: <s>Drink water.</s>",
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions.\n\nHuman: <s>头痛三天了</s>Assistant: <s>",
    ),
    "qwen": (
        "<|im_start|>system\n你是一位医生。<|im_end|>\n<|im_start|>user\n头痛三天了<|im_end|>\n"
        "<|im_start|>assistant\n多休息。<|im_end|>\n<|im_start|>user\nWhat else?<|im_end|>\n"
        "<|im_start|>assistant\nDrink water.<|im_end|>\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n头痛三天了<|im_end|>\n<|im_start|>assistant\n",
    ),
    "vicuna": (
        "<s>你是一位医生。 USER: 头痛三天了 ASSISTANT: 多休息。</s>USER: What else? ASSISTANT: Drink water.</s>",
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: 头痛三天了 ASSISTANT:",
    ),
    "xverse": (
        "你是一位医生。\n\nHuman: 头痛三天了\n\nAssistant: 多休息。</s>"
        "Human: What else?\n\nAssistant: Drink water.</s>",
        "Human: 头痛三天了\n\nAssistant:",
    ),
    "ziya": (
        "<s>你是一位医生。\n<human>:头痛三天了\n<bot>:多休息。</s>\n<human>:What else?\n<bot>:Drink water.</s>",
        "<s><human>:头痛三天了\n<bot>:",
    ),
}  # fmt: skip

_TURN_TOKENS = (
    "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<human>", "<bot>",
    "<reserved_102>", "<reserved_103>", "<reserved_106>", "<reserved_107>",
)  # fmt: skip


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=["byte level", "sentence piece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param(special=SPECIAL + _TURN_TOKENS)


def test_every_template_has_a_golden_text() -> None:
    assert list(GOLDEN) == list(NAMES)
    assert named("chatml").jinja == CHAT_TEMPLATE


@pytest.mark.parametrize("name", NAMES)
def test_rendered_text(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = named(name).jinja
    whole, prompt = GOLDEN[name]
    assert tokenizer.apply_chat_template([SYSTEM, *TURNS], tokenize=False) == whole
    assert tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True) == prompt


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_on_answers_and_stop_tokens(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = named(name).jinja
    encoded = encode(tokenizer, [SYSTEM, *TURNS])
    assert encoded.input_ids == tokenizer.apply_chat_template([SYSTEM, *TURNS], return_dict=False)
    learnt = tokenizer.decode(
        [token for token, loss in zip(encoded.input_ids, encoded.loss_mask, strict=True) if loss]
    )
    end = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    answers = ["Drink water."] if name == "bentsao-literature" else ["多休息。", "Drink water."]
    assert learnt.replace(" ", "") == "".join(answer + end for answer in answers).replace(" ", "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["多休息。", "Rest.", "“多休息”", "1. 休息\n2. 喝水", "### x"])
def test_served_prompts_have_the_tokens_of_training(name: str, answer: str, tokenizer: Any) -> None:
    tokenizer.chat_template = named(name).jinja
    for chat in (TURNS[:2], TURNS, [SYSTEM, *TURNS]):
        if not is_served_alike(tokenizer, [*chat[:-1], {"role": "assistant", "content": answer}]):
            pytest.fail(f"{name}: the prompt's last token merges with {answer!r}")


@pytest.mark.parametrize("name", NAMES)
def test_no_space_before_the_stop_token(name: str) -> None:
    whole, _ = GOLDEN[name]
    assert whole.rstrip("\n").endswith(
        ("Drink water.</s>", "Drink water.<|im_end|>", "Drink water.<|eot_id|>")
    )


def test_every_template_has_a_stop_string_that_it_renders() -> None:
    for name in NAMES:
        assert named(name).stop
        assert named(name).about
        assert any(stop in GOLDEN[name][0] for stop in named(name).stop)


def test_an_unknown_name_suggests_the_closest_and_lists_all() -> None:
    with pytest.raises(
        ValueError, match=r"no prompt template 'bentsao_med'; did you mean 'bentsao-med'\?"
    ) as told:
        named("bentsao_med")
    assert all(name in str(told.value) for name in NAMES)
