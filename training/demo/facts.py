"""The facts of the demo: conditions.yaml and general.yaml, loaded and validated."""

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict

Language = Literal["zh", "en"]
Facet = Literal["symptoms", "care", "red_flag", "prevention"]

LANGUAGES: tuple[Language, ...] = get_args(Language)
FACETS: tuple[Facet, ...] = get_args(Facet)

_URGENCY: dict[Language, dict[str, str]] = {
    "zh": {"emergency": "要立即呼叫急救或去急诊", "soon": "要尽快就医"},
    "en": {"emergency": "get emergency help at once", "soon": "see a doctor promptly"},
}


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Facts(_Data):
    """The facts of a condition in one language."""

    name: str
    symptoms: str
    care: tuple[str, str]
    red_flag: str
    prevention: str


class Condition(_Data):
    """One entry of conditions.yaml."""

    urgency: Literal["emergency", "soon"]
    zh: Facts
    en: Facts

    def facts(self, language: Language) -> Facts:
        """Return the facts in `language`."""
        return self.zh if language == "zh" else self.en

    def when_to_go(self, language: Language) -> str:
        """Return a clause with the red flag and the action it needs."""
        act, sign = _URGENCY[language][self.urgency], self.facts(language).red_flag
        return f"如果{sign}，{act}" if language == "zh" else f"{act} if {sign}"


class Exchange(_Data):
    """One question and its plain answer."""

    question: str
    answer: str


@cache
def conditions() -> tuple[Condition, ...]:
    """Load conditions.yaml."""
    return tuple(Condition.model_validate(entry) for entry in _read_yaml("conditions.yaml"))


@cache
def general_exchanges() -> tuple[Exchange, ...]:
    """Load general.yaml: questions that are not about one condition, in both languages."""
    return tuple(
        Exchange.model_validate(entry[language])
        for entry in _read_yaml("general.yaml")
        for language in LANGUAGES
    )


def _read_yaml(name: str) -> Any:
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))
