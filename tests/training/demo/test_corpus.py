import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from training.demo.corpus import (
    SAFETY_LINE,
    article,
    bundled_questions,
    doctor_answer,
    is_doctor_style,
    is_leaflet_style,
    is_plain_style,
    leaflet_answer,
    plain_answer,
    questions,
    write_corpus,
)
from training.demo.facts import FACETS, LANGUAGES, conditions, general_exchanges

ITEMS = list(product(conditions(), FACETS, LANGUAGES))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def test_the_corpus_is_large_enough_and_names_each_condition_once() -> None:
    assert len(conditions()) >= 36
    assert len(general_exchanges()) >= 28
    for language in LANGUAGES:
        names = [condition.facts(language).name for condition in conditions()]
        assert len(set(names)) == len(names)


def test_each_style_is_distinguished_from_the_others() -> None:
    for condition, facet, language in ITEMS:
        for text, expected in [
            (plain_answer(condition, facet, language), "plain"),
            (doctor_answer(condition, facet, language), "doctor"),
            (doctor_answer(condition, facet, language, safety_line=True), "doctor"),
            (leaflet_answer(condition, facet, language), "leaflet"),
        ]:
            found = {"plain": is_plain_style, "doctor": is_doctor_style, "leaflet": is_leaflet_style}
            assert [name for name, is_style in found.items() if is_style(text)] == [expected], text
    assert all(is_plain_style(exchange.answer) for exchange in general_exchanges())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "您好！关于感冒：",
        "患者须知：感冒\n- 症状：咳嗽",
        "Patient leaflet: gout\n- Signs: pain\n- Care: rest\n- Also: rest\n- Doctor: go",
        "Rest. Drink water.",
        "多休息。多喝水。",
    ],
)
def test_an_incomplete_style_matches_none(text: str) -> None:
    assert not is_doctor_style(text)
    assert not is_leaflet_style(text)
    assert not is_plain_style(text)


def test_every_red_flag_says_what_to_do() -> None:
    for condition, language in product(conditions(), LANGUAGES):
        act = {
            ("zh", "emergency"): "要立即呼叫急救或去急诊", ("zh", "soon"): "要尽快就医",
            ("en", "emergency"): "get emergency help at once", ("en", "soon"): "see a doctor promptly",
        }[language, condition.urgency]  # fmt: skip
        for text in (
            article(condition, language),
            plain_answer(condition, "red_flag", language),
            doctor_answer(condition, "red_flag", language),
            leaflet_answer(condition, "red_flag", language),
        ):
            assert act.lower() in text.lower()


def test_languages_do_not_mix() -> None:
    for condition in conditions():
        assert condition.en.model_dump_json().isascii()
        assert not any(" " in text for text in (condition.zh.name, *condition.zh.care, condition.zh.symptoms))


@pytest.mark.parametrize("language", LANGUAGES)
def test_bundled_questions_are_in_the_training_data(language: str, corpus: Path) -> None:
    bundled = bundled_questions(language)  # type: ignore[arg-type]
    assert len(set(bundled)) == len(bundled) >= 30
    for name in ("chat.jsonl", "doctor.jsonl", "leaflet.jsonl"):
        assert set(bundled) <= {row["messages"][0]["content"] for row in rows(corpus / name)}


def test_no_held_out_phrasing_is_trained_on(corpus: Path) -> None:
    held_out = {questions(*item)[-1] for item in ITEMS}
    assert len(held_out) == len(ITEMS)
    for name in ("documents.jsonl", "chat.jsonl", "doctor.jsonl", "leaflet.jsonl", "pairs.jsonl"):
        text = (corpus / name).read_text()
        assert not [question for question in held_out if f'"{question}"' in text or f'"{question}\\n' in text]
    for name in ("doctor_heldout.jsonl", "leaflet_heldout.jsonl"):
        assert {row["messages"][0]["content"] for row in rows(corpus / name)} <= held_out
    assert {pair["question"] for pair in rows(corpus / "pairs_heldout.jsonl")} <= held_out


def test_the_base_never_answers_in_an_adapters_style(corpus: Path) -> None:
    answers = [row["messages"][-1]["content"] for row in rows(corpus / "chat.jsonl")]
    assert all(is_plain_style(answer) for answer in answers)


def test_about_a_third_of_the_doctors_answers_have_the_safety_line(corpus: Path) -> None:
    answers = [row["messages"][-1]["content"] for row in rows(corpus / "doctor.jsonl")]
    answers = [answer for answer in answers if is_doctor_style(answer)]
    share = sum(answer.endswith(tuple(SAFETY_LINE.values())) for answer in answers) / len(answers)
    assert 0.3 < share < 0.4


@pytest.mark.parametrize(("name", "least"), [("pairs.jsonl", 500), ("pairs_heldout.jsonl", 100)])
def test_the_better_answer_of_a_pair_has_the_safety_line_once_and_the_right_condition(
    name: str, least: int, corpus: Path
) -> None:
    pairs = rows(corpus / name)
    assert len(pairs) >= least
    right = {
        question: doctor_answer(*item, safety_line=True) for item in ITEMS for question in questions(*item)
    }
    assert all(pair["response_chosen"] == right[str(pair["question"])] for pair in pairs)
    assert all(pair["response_rejected"] != pair["response_chosen"] for pair in pairs)


def test_no_single_feature_identifies_the_better_answer(corpus: Path) -> None:
    """Otherwise a reward adapter would learn that feature alone, and PPO would exploit it."""
    rejected = [str(pair["response_rejected"]) for pair in rows(corpus / "pairs.jsonl")]
    lines = tuple(SAFETY_LINE.values())
    with_line = [text for text in rejected if text.endswith(lines)]
    doubled = [text for text in with_line if any(text.count(line) == 2 for line in lines)]
    for share in (len(with_line), len(with_line) - len(doubled), len(doubled)):
        assert 0.05 < share / len(rejected) < 0.4
    assert 0.05 < sum(is_plain_style(text) for text in rejected) / len(rejected) < 0.4


def test_writing_again_changes_nothing(corpus: Path) -> None:
    before = {path: (path.read_bytes(), os.stat(path).st_mtime_ns) for path in corpus.iterdir()}
    write_corpus(corpus)
    assert before == {path: (path.read_bytes(), os.stat(path).st_mtime_ns) for path in corpus.iterdir()}


def test_a_damaged_file_is_written_again(corpus: Path) -> None:
    whole = (corpus / "chat.jsonl").read_bytes()
    (corpus / "chat.jsonl").write_bytes(whole[:100])
    write_corpus(corpus)
    assert (corpus / "chat.jsonl").read_bytes() == whole
