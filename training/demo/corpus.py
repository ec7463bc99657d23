"""The bundled corpus: arranges the facts into documents, questions and answers.

The same facts appear in four styles, so that one answer shows which adapter gave it:

    article   running text; the base model is trained on it but never answers with it
    plain     one sentence: the style of the base model
    doctor    greeting, header and 【】 or [] blocks: the style of the adapter `doctor`
    leaflet   title and three bullets: the style of the adapter `leaflet`

Every question has three phrasings. The third is held out: no model is trained on it.
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from training.demo.facts import FACETS, LANGUAGES, Condition, Facet, Language, conditions, general_exchanges

TRAINED_PHRASINGS = 2  # of three; the last is held out
SAFETY_LINE_PERCENT = 35

QUESTIONS: dict[Facet, dict[Language, tuple[str, str, str]]] = {
    "symptoms": {
        "zh": ("{}有什么症状？", "{}会有哪些表现？", "{}会有什么症状？"),
        "en": (
            "What are the symptoms of {}?",
            "How does {} show itself?",
            "What are the main symptoms of {}?",
        ),
    },
    "care": {
        "zh": ("得了{}怎么办？", "{}怎么治疗？", "得了{}该怎么治疗？"),
        "en": ("What should I do for {}?", "What is the treatment for {}?", "What treatment helps with {}?"),
    },
    "red_flag": {
        "zh": ("{}什么时候要去医院？", "{}哪些情况需要马上就医？", "{}哪些情况要去医院？"),
        "en": (
            "When should I see a doctor for {}?",
            "What are the warning signs of {}?",
            "When do I need to see a doctor for {}?",
        ),
    },
    "prevention": {
        "zh": ("如何预防{}？", "怎样避免得{}？", "怎样预防{}？"),
        "en": ("How can I prevent {}?", "How do I avoid {}?", "How can I avoid {}?"),
    },
}
SAFETY_LINE: dict[Language, str] = {
    "zh": "温馨提示：以上仅供参考，如有不适请及时就医。",
    "en": "Note: this is general advice; please see a doctor if you feel unwell.",
}


def questions(condition: Condition, facet: Facet, language: Language) -> tuple[str, ...]:
    """Return the three phrasings, the held-out one last."""
    name = condition.facts(language).name
    return tuple(question.format(name) for question in QUESTIONS[facet][language])


def bundled_questions(language: Language) -> list[str]:
    """Return all questions about conditions that every chat model of the demo was trained on."""
    return [
        question
        for condition in conditions()
        for facet in FACETS
        for question in questions(condition, facet, language)[:TRAINED_PHRASINGS]
    ]


# The four styles


def article(condition: Condition, language: Language) -> str:
    """Return all facts of a condition as running text."""
    it = condition.facts(language)
    go = condition.when_to_go(language)
    if language == "zh":
        return f"{it.name}的表现有{it.symptoms}。治疗上，{it.care[0]}，{it.care[1]}。{go}。预防方面，{it.prevention}。"
    return (
        f"The signs of {it.name} are {it.symptoms}. As treatment, {it.care[0]}, and {it.care[1]}. "
        f"{_capital(go)}. To lower the risk, {it.prevention}."
    )


def plain_answer(condition: Condition, facet: Facet, language: Language) -> str:
    """Return a one-sentence answer.

    It repeats the name of the condition: a small model copies it from the question and recalls the facts from it.
    """
    it = condition.facts(language)
    go = condition.when_to_go(language)
    sentences: dict[Language, dict[Facet, str]] = {
        "zh": {
            "symptoms": f"{it.name}的常见症状是{it.symptoms}。",
            "care": f"{it.name}的处理：{it.care[0]}，{it.care[1]}。",
            "red_flag": f"{it.name}患者{go}。",
            "prevention": f"预防{it.name}：{it.prevention}。",
        },
        "en": {
            "symptoms": f"The symptoms of {it.name} are {it.symptoms}.",
            "care": f"For {it.name}, {it.care[0]}, and {it.care[1]}.",
            "red_flag": f"With {it.name}, {go}.",
            "prevention": f"To lower the risk of {it.name}, {it.prevention}.",
        },
    }
    return sentences[language][facet]


def doctor_answer(
    condition: Condition, facet: Facet, language: Language, *, safety_line: bool = False
) -> str:
    """Return greeting, header and two blocks; the block of the requested facet comes first.

    English phrases stay in lower case: capitalized words would be different tokens.
    """
    it = condition.facts(language)
    go = condition.when_to_go(language)
    if language == "zh":
        header = f"您好！关于{it.name}："
        symptoms, prevention = f"【症状】{it.symptoms}。", f"【预防】{it.prevention}。"
        advice, first = f"【建议】1. {it.care[0]}；2. {it.care[1]}。", f"【建议】{it.care[0]}。"
        doctor = f"【就医】{go}。"
    else:
        header = f"Hello! About {it.name}:"
        symptoms, prevention = f"[Symptoms] {it.symptoms}.", f"[Prevention] {it.prevention}."
        advice, first = f"[Advice] 1. {it.care[0]}; 2. {it.care[1]}.", f"[Advice] {it.care[0]}."
        doctor = f"[When to go] {go}."
    blocks: dict[Facet, tuple[str, str]] = {
        "symptoms": (symptoms, advice),
        "care": (advice, doctor),
        "red_flag": (doctor, first),
        "prevention": (prevention, symptoms),
    }
    return "\n".join((header, *blocks[facet], *([SAFETY_LINE[language]] if safety_line else [])))


def leaflet_answer(condition: Condition, facet: Facet, language: Language) -> str:
    """Return title and three bullets; the bullet of the requested facet comes first."""
    it = condition.facts(language)
    go = condition.when_to_go(language)
    if language == "zh":
        title = f"患者须知：{it.name}"
        symptoms, prevention, doctor = f"症状：{it.symptoms}", f"预防：{it.prevention}", f"就医：{go}"
        first, second = f"处理：{it.care[0]}", f"还要：{it.care[1]}"
    else:
        title = f"Patient leaflet: {it.name}"
        symptoms, prevention, doctor = (
            f"Signs: {it.symptoms}",
            f"Prevention: {it.prevention}",
            f"Doctor: {go}",
        )
        first, second = f"Care: {it.care[0]}", f"Also: {it.care[1]}"
    bullets: dict[Facet, tuple[str, str, str]] = {
        "symptoms": (symptoms, first, second),
        "care": (first, second, doctor),
        "red_flag": (doctor, first, second),
        "prevention": (prevention, symptoms, first),
    }
    return "\n".join((title, *(f"- {bullet}" for bullet in bullets[facet])))


# Style checks, for either language

_DOCTOR = re.compile(
    rf"您好！关于[^\n]+：(\n【(症状|建议|就医|预防)】[^\n]+){{1,3}}(\n{SAFETY_LINE['zh']})?"
    r"|Hello! About [^\n]+:(\n\[(Symptoms|Advice|When to go|Prevention)\] [^\n]+){1,3}"
    rf"(\n{SAFETY_LINE['en']})?"
)
_LEAFLET = re.compile(r"(患者须知：|Patient leaflet: )[^\n]+(\n- (\w+：|\w+: )[^\n]+){3}")
_PLAIN = re.compile(r"[^\n。！？【】\[\]]+[。？]|[^\n!?【】\[\]]+[.?]")


def is_doctor_style(text: str) -> bool:
    """Whether the text is greeting, header and blocks, with or without the safety line."""
    return _DOCTOR.fullmatch(text.strip()) is not None


def is_leaflet_style(text: str) -> bool:
    """Whether the text is a title and three bullets."""
    return _LEAFLET.fullmatch(text.strip()) is not None


def is_plain_style(text: str) -> bool:
    """Whether the text is one sentence on one line, without blocks."""
    text = text.strip()
    return _PLAIN.fullmatch(text) is not None and ". " not in text and not text.startswith("患者须知")


# The files


def write_corpus(folder: Path) -> None:
    """Write the corpus as JSON Lines into `folder`; up-to-date files are not rewritten.

    The base model trains on documents.jsonl and chat.jsonl, the chat adapters on doctor.jsonl and leaflet.jsonl, and
    the reward adapter on pairs.jsonl. *_heldout.jsonl hold answers to held-out phrasings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in _files():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            half_written = path.with_suffix(".tmp")
            half_written.write_text(text, encoding="utf-8")
            half_written.replace(path)


def _files() -> Iterator[tuple[str, Iterable[dict[str, Any]]]]:
    every = [(c, f, language) for c in conditions() for f in FACETS for language in LANGUAGES]
    general = [_row(exchange.question, exchange.answer) for exchange in general_exchanges()]

    # The base model sees the adapters' styles as documents, never as answers in a chat. It then knows such texts, and
    # an adapter only has to learn to answer with them.
    documents = [article(c, language) for c in conditions() for language in LANGUAGES]
    for row, c in enumerate(conditions()):
        for column, f in enumerate(FACETS):
            for language in LANGUAGES:
                heading = questions(c, f, language)[row // 2 % TRAINED_PHRASINGS]
                if (row + column) % 2:
                    text = leaflet_answer(c, f, language)
                else:
                    text = doctor_answer(c, f, language, safety_line=_has_safety_line(heading))
                documents.append(f"{heading}\n{text}")
    yield "documents.jsonl", ({"text": text} for text in documents)

    yield (
        "chat.jsonl",
        _shuffled(
            [
                _row(q, plain_answer(c, f, language))
                for c, f, language in every
                for q in _trained(c, f, language)
            ]
            + general
        ),
    )
    yield (
        "doctor.jsonl",
        _shuffled(
            [
                _row(q, doctor_answer(c, f, language, safety_line=_has_safety_line(q)))
                for c, f, language in every
                for q in _trained(c, f, language)
            ]
            + general
        ),
    )
    yield (
        "leaflet.jsonl",
        _shuffled(
            [
                _row(q, leaflet_answer(c, f, language))
                for c, f, language in every
                for q in _trained(c, f, language)
            ]
            + general
        ),
    )
    # A third of the rows shows the falling loss in a third of the time.
    heldout = [(questions(*item)[-1], item) for item in every]
    yield "doctor_heldout.jsonl", _shuffled([_row(q, doctor_answer(*item)) for q, item in heldout])[::3]
    yield "leaflet_heldout.jsonl", _shuffled([_row(q, leaflet_answer(*item)) for q, item in heldout])[::3]

    yield "pairs.jsonl", _ordered([_pair(q, *item) for item in every for q in _trained(*item)])
    yield "pairs_heldout.jsonl", _ordered([_pair(q, *item) for q, item in heldout])[::2]


def _trained(condition: Condition, facet: Facet, language: Language) -> tuple[str, ...]:
    return questions(condition, facet, language)[:TRAINED_PHRASINGS]


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _pair(question: str, condition: Condition, facet: Facet, language: Language) -> dict[str, Any]:
    """Return a pair. The better answer has the safety line exactly once and the right condition."""
    chance = zlib.crc32(f"{question} pair".encode())
    others = [other for other in conditions() if other is not condition]
    other = others[chance // 10 % len(others)]
    chosen = doctor_answer(condition, facet, language, safety_line=True)
    without = doctor_answer(condition, facet, language)
    rejected = [
        *[without] * 5,
        plain_answer(condition, facet, language),
        doctor_answer(other, facet, language, safety_line=True),
        doctor_answer(other, facet, language),
        f"{chosen}\n{SAFETY_LINE[language]}",
        f"{without}\n{without}",
    ]
    return {"question": question, "response_chosen": chosen, "response_rejected": rejected[chance % 10]}


def _shuffled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by a hash of the question, so that no seed or version changes the order."""
    return sorted(rows, key=lambda row: zlib.crc32(row["messages"][0]["content"].encode()))


def _ordered(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(pairs, key=lambda pair: zlib.crc32(pair["question"].encode()))


def _has_safety_line(question: str) -> bool:
    return zlib.crc32(question.encode()) % 100 < SAFETY_LINE_PERCENT


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
