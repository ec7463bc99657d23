"""Named prompt templates, for base models that bring no chat template of their own.

Each is one Jinja chat template beside this file, rendered alike by transformers in training and by vLLM in
serving. What a base brings itself is always the better choice. All of them end every answer with the token
that stops it, without a space before it, and mark what carries loss with `{% generation %}`. A system message
takes the place of the template's own opening sentence, or opens the chat where the template has none. `bos_token`
stands where the tokenizers of the bases that a template was made for put one.
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
    """The chat template's text."""
    stop: tuple[str, ...]
    """Where generation must stop even if the base's end token is another or does not come: the turn's end
    token, or the text with which the next question would begin."""
    about: str
    """Whose prompt it is."""


_TABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "alpaca": (("### Instruction:",), "Alpaca and Chinese-Alpaca: English sentence, Instruction, Response"),
    "baichuan": (("<reserved_102>",), "Baichuan-13B-Chat"),
    "baichuan2": (("<reserved_106>",), "Baichuan2-Chat"),
    "bentsao-bloom": (
        ("### 回答：",),
        "BenTsao's bloom_deploy, for its Huozi and Bloom adapters; later turns repeat question and answer only",
    ),
    "bentsao-literature": (
        ("### 说明:",),
        "BenTsao's literature_template; earlier turns stand in the instruction as <user>: and <bot>:, "
        "so that the last answer alone carries loss",
    ),
    "bentsao-med": (
        ("### 问题:",),
        "BenTsao's med_template, for its LLaMA and Alpaca adapters; later turns repeat question and answer only",
    ),
    "chatml": (("<|im_end|>",), "ChatML: what many bases name <|im_start|> and <|im_end|> for"),
    "deepseek": (("User:",), "DeepSeek LLM Chat, the first generation"),
    "huatuo": (("<病人>：",), "HuatuoGPT: Chinese sentence, <病人>： and <HuatuoGPT>："),
    "llama2": (("[INST]",), "Llama-2-Chat; Meta's own has one more space before the end token"),
    "llama3": (("<|eot_id|>",), "Llama-3-Instruct"),
    "mistral": (("[INST]",), "Mistral-Instruct as its first model card has it; system before the first question"),
    "orion": (("Human:",), "Orion-14B-Chat"),
    "phoenix": (("Human:",), "Phoenix, the sibling of HuatuoGPT on BLOOMZ"),
    "qwen": (("<|im_end|>",), "Qwen1.5 and Qwen2: ChatML with a sentence of its own where a chat has no system"),
    "vicuna": (("USER:",), "Vicuna 1.1 and later; MedicalGPT's middle years, on BLOOMZ"),
    "xverse": (("Human:",), "XVERSE-Chat"),
    "ziya": (("<human>:",), "Ziya-LLaMA; MedicalGPT's and HuatuoGPT-13B's base"),
}  # fmt: skip

NAMES = tuple(_TABLE)


@cache
def named(name: str) -> Template:
    """The template of that name. Raises ValueError listing all names, with the nearest one."""
    if name not in _TABLE:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"no prompt template {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" There are: {', '.join(NAMES)}"
        )
    stop, about = _TABLE[name]
    jinja = (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
    return Template(name, jinja, stop, about)


CHAT_TEMPLATE = named("chatml").jinja
"""What a base trained here from scratch talks in."""
