"""Named prompt templates, for base models without a chat template.

Each is a Jinja chat template in this folder; transformers renders it in training and vLLM in serving, with the same
result. A template that comes with the base model is always the better choice. All templates end each answer with its
stop token, without a space before it, and mark the loss tokens with `{% generation %}`. A system message replaces the
template's own preamble, or opens the chat if there is none. `bos_token` is where the tokenizers of the original base
models put it.
"""

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Template:
    """One prompt template."""

    name: str
    jinja: str
    """Text of the chat template."""
    stop: tuple[str, ...]
    """Stop strings, needed if the base has another end token or does not generate it: the end token of a turn, or the
    text that starts the next question."""
    about: str
    """The models that use this template."""


_TABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "alpaca": (("### Instruction:",), "Alpaca and Chinese-Alpaca: English preamble, Instruction, Response"),
    "baichuan": (("<reserved_102>",), "Baichuan-13B-Chat"),
    "baichuan2": (("<reserved_106>",), "Baichuan2-Chat"),
    "bentsao-bloom": (
        ("### 回答：",),
        "BenTsao's bloom_deploy, for its Huozi and Bloom adapters; later turns repeat question and answer only",
    ),
    "bentsao-literature": (
        ("### 说明:",),
        "BenTsao's literature_template; earlier turns are in the instruction as <user>: and <bot>:, "
        "so that only the last answer carries loss",
    ),
    "bentsao-med": (
        ("### 问题:",),
        "BenTsao's med_template, for its LLaMA and Alpaca adapters; later turns repeat question and answer only",
    ),
    "chatml": (("<|im_end|>",), "ChatML: for bases with the tokens <|im_start|> and <|im_end|>"),
    "deepseek": (("User:",), "DeepSeek LLM Chat, the first generation"),
    "huatuo": (("<病人>：",), "HuatuoGPT: Chinese preamble, <病人>： and <HuatuoGPT>："),
    "llama2": (("[INST]",), "Llama-2-Chat; Meta's template has one more space before the end token"),
    "llama3": (("<|eot_id|>",), "Llama-3-Instruct"),
    "mistral": (("[INST]",), "Mistral-Instruct as in its first model card; system message before the first question"),
    "orion": (("Human:",), "Orion-14B-Chat"),
    "phoenix": (("Human:",), "Phoenix, the sibling of HuatuoGPT on BLOOMZ"),
    "qwen": (("<|im_end|>",), "Qwen1.5 and Qwen2: ChatML with a default system message"),
    "vicuna": (("USER:",), "Vicuna 1.1 and later; MedicalGPT's middle years, on BLOOMZ"),
    "xverse": (("Human:",), "XVERSE-Chat"),
    "ziya": (("<human>:",), "Ziya-LLaMA; MedicalGPT's and HuatuoGPT-13B's base"),
}  # fmt: skip

NAMES = tuple(_TABLE)


@cache
def named(name: str) -> Template:
    """Return a template by name. Raises ValueError that lists all names and suggests the closest one."""
    if name not in _TABLE:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"no prompt template {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" Available: {', '.join(NAMES)}"
        )
    stop, about = _TABLE[name]
    jinja = (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
    return Template(name, jinja, stop, about)


CHAT_TEMPLATE = named("chatml").jinja
"""Chat template of base models trained by stage scratch."""
