import io
import math
import re
from functools import partial
from typing import Any

import pytest

from tests.training.small_tokenizers import byte_level, sentence_piece
from training.templates import named
from training.tokens.preview import preview, wants_colour

ASKED = {"role": "user", "content": "鬱悶😀？"}
ANSWERED = {"role": "assistant", "content": "龘休息。"}
CHAT = {"messages": [{"role": "system", "content": "你是医生"}, ASKED, ANSWERED]}
REPLY = {"role": "assistant", "content": "No."}


@pytest.fixture(scope="module", params=[byte_level, partial(sentence_piece, prefix_space=False)])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param(chat_template=named("chatml").jinja, eos_token="<|im_end|>")


def lines(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> str:
    return "\n".join(preview(rows, tokenizer, **{"colour": False, "max_length": 500} | settings))


def test_a_chat_is_shown_as_the_model_sees_it(tokenizer: Any) -> None:
    assert (
        "«<|im_start|>»system↵\n你是医生«<|im_end|>»↵\n"
        "«<|im_start|>»user↵\n鬱悶😀？«<|im_end|>»↵\n"
        "«<|im_start|>»assistant↵\n⟦龘休息。«<|im_end|>»⟧↵\n\n"
    ) in lines([CHAT], tokenizer)


def test_text_like_a_special_token_is_not_marked_as_one(tokenizer: Any) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "<|im_fin|>"}]}
    assert "⟦<|im_fin|>«<|im_end|>»⟧" in lines([row], tokenizer)


def test_colour_does_not_change_the_text(tokenizer: Any) -> None:
    coloured = lines([CHAT], tokenizer, colour=True)
    assert "\033[32m龘休息。\033[0m\033[32;7m<|im_end|>\033[0m" in coloured
    bare = re.sub(r"\033\[[\d;]+m", "", coloured).replace("row 1 of 1, chat", "── row 1 of 1, chat ──")
    assert bare == re.sub("[«»⟦⟧]", "", lines([CHAT], tokenizer))


def test_colour_is_reset_on_each_line(tokenizer: Any) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "1.\n\n2."}]}
    assert "\033[32m1.↵\033[0m\n\033[32m↵\033[0m\n\033[32m2.\033[0m" in lines([row], tokenizer, colour=True)


def test_invisible_characters_are_shown(tokenizer: Any) -> None:
    row = {"text": "a\tb\x1b[31m\u200b\u202ec\r"}
    shown = lines([row], tokenizer, reads_on=True)
    assert "⟦a⇥\tb<U+001B>[31m<U+200B><U+202E>c<U+000D>«" in shown


def test_an_incomplete_character_is_dropped(tokenizer: Any) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "a" + "龘" * 20}]}
    prompt = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, return_dict=False)
    for length in range(10, 20):
        shown = lines([row], tokenizer, max_length=len(prompt) + length)
        assert f"⟦a{'龘' * ((length - 1) // 3)}⟧…" in shown


def test_all_tokens_of_a_document_have_loss(tokenizer: Any) -> None:
    shown = lines([{"text": "龘休息。"}], tokenizer, reads_on=True)
    length = len(tokenizer("龘休息。").input_ids) + 1
    told = (
        rf"row 1 of 1, document ──  {length} tokens, {length} with loss\n⟦龘休息。«(<\|endoftext\|>|</s>)»⟧"
    )
    assert re.search(told, shown)
    assert "(100%) have loss" in shown


def test_all_turns_of_a_chat_read_as_a_document_have_loss(tokenizer: Any) -> None:
    shown = lines([CHAT], tokenizer, reads_on=True)
    assert "chat read as a document" in shown
    assert "\n⟦«<|im_start|>»system↵" in shown


def test_a_long_document_is_split(tokenizer: Any) -> None:
    row = {"text": "休息" * 50}
    length = len(tokenizer(row["text"]).input_ids) + 1
    shown = lines([row, row], tokenizer, reads_on=True, max_length=40, packing=None)
    count = math.ceil(length / 40)
    assert f"{length} with loss, split into {count} parts of at most 40, the first is shown\n⟦休息" in shown
    assert f"{2 * length} (100%) have loss" in shown
    assert "\ntoo long  2 over max_length 40, split into parts\n" in shown


@pytest.mark.parametrize(
    ("packing", "told"),
    [
        (
            None,
            "3 documents and parts into 2 rows of max_length 21, {full:.0%} full, if the base model's architecture",
        ),
        (True, "3 documents and parts into 2 rows of max_length 21, {full:.0%} full"),
        (False, "no: 3 rows, each a document or a part of one"),
    ],
)
def test_packing_is_shown(packing: bool | None, told: str) -> None:
    tokenizer = byte_level(eos_token="<|im_end|>")
    rows = [{"text": "龘" * 5}, {"text": "龘"}, {"text": "龘" * 3}]  # 16, 4 and 10 tokens
    shown = lines(rows, tokenizer, reads_on=True, packing=packing, max_length=21)
    assert f"\npacked    {told.format(full=30 / 42)}" in shown


def test_a_pair_shows_its_prompt_and_both_answers(tokenizer: Any) -> None:
    shown = lines(
        [{"prompt": [ASKED, ANSWERED, ASKED], "chosen": [ANSWERED], "rejected": [REPLY]}], tokenizer
    )
    assert shown.count("鬱悶") == 2
    assert re.search(r"row 1 of 1, chosen ──  \d+ tokens, \d+ with loss\n«", shown)
    assert "龘休息。«<|im_end|>»↵\n«<|im_start|>»user" in shown, "answers in the prompt have no loss"
    assert "⟦龘休息。«<|im_end|>»⟧↵\n── row 1 of 1, rejected ──" in shown
    assert "⟦No.«<|im_end|>»⟧↵" in shown


def test_in_colour_a_rejected_answer_is_red(tokenizer: Any) -> None:
    shown = lines([{"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [REPLY]}], tokenizer, colour=True)
    assert "\033[32m龘休息。" in shown
    assert "\033[31mNo." in shown


@pytest.mark.parametrize(
    ("label", "title", "ink"), [(True, "good answer", "32"), (False, "bad answer", "31")]
)
def test_feedback(label: bool, title: str, ink: str, tokenizer: Any) -> None:
    row = {"prompt": [ASKED], "completion": [REPLY], "label": label}
    shown = lines([row], tokenizer, colour=True)
    assert f"row 1 of 1, {title}" in shown
    assert f"\033[{ink}mNo." in shown


def test_a_prompt_ends_with_the_opening_of_the_answer(tokenizer: Any) -> None:
    shown = lines([{"prompt": [ASKED], "reference": "x"}], tokenizer)
    assert "«<|im_start|>»assistant↵\n\nrows" in shown
    assert ", 0 with loss" in shown


def test_statistics_cover_all_rows(tokenizer: Any) -> None:
    long = {"messages": [{"role": "user", "content": "休息" * 200}, ANSWERED]}
    shown = lines([CHAT, CHAT, long], tokenizer, shown=1, max_length=120)
    assert shown.count("──") == 2
    ids = tokenizer.apply_chat_template(CHAT["messages"], return_dict=False)
    longest = len(tokenizer.apply_chat_template(long["messages"], return_dict=False))
    assert "\nrows      3\n" in shown
    assert f"\ntokens    {2 * len(ids) + longest:,}, of which " in shown
    assert f"\nlength    50 % up to {len(ids)}, 90 % up to {len(ids)}, " in shown
    assert f"; longest {longest} (row 3)\n" in shown
    assert shown.endswith("\ntoo long  1 over max_length 120, of which 1 lose the whole answer")


def test_a_row_that_is_too_long_is_marked(tokenizer: Any) -> None:
    shown = lines([CHAT], tokenizer, max_length=5)
    assert "with loss, " not in shown.split("\n")[0]
    assert "0 with loss, over max_length 5, shown up to it, no answer is left" in shown


def test_an_unusable_row_does_not_hide_the_others() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    tokenizer = byte_level(chat_template=template + named("chatml").jinja, eos_token="<|im_end|>")
    shown = lines([CHAT, {"messages": [ASKED, ANSWERED]}], tokenizer)
    assert "row 1 ──  cannot be used: the chat template refuses this chat: no system, please" in shown
    assert "⟦龘休息。" in shown
    assert "\nunusable  1, the first is row 1: " in shown


def test_rows_with_a_different_server_prompt_are_reported() -> None:
    template = named("chatml").jinja.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    )
    shown = lines([CHAT], byte_level(chat_template=template, eos_token="<|im_end|>"))
    assert "the server's prompt has different tokens" in shown
    assert "\nserved    1 rows, the first is row 1, do not begin with the server's prompt" in shown


def test_no_rows() -> None:
    assert lines([], byte_level()).endswith("\nrows      0")


def test_colour_is_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
