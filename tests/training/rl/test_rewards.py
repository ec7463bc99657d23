"""Each kind of reward by itself; stages/test_ppo.py tests reward adapters and weighted sums."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.training.coded_models import modules_below, with_own_code
from tests.training.judges import running_judge
from training.config import Reward as RewardConfig
from training.errors import ConfigError, ServiceError
from training.rl.rewards import Rewards, function_scorer, judge_scorer, model_scorer, plain_scorer

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "感冒怎么办？"}, {"role": "assistant", "content": "多休息。"}],
    [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is gout?"},
        {"role": "assistant", "content": "{A} disease."},
    ],
]


def lengths(conversations: Sequence[list[dict[str, str]]]) -> list[int]:
    return [len(messages[-1]["content"]) for messages in conversations]


def nothing(conversations: Sequence[object]) -> list[float]:
    return []


# Functions


def test_a_function_gets_conversations_and_returns_numbers() -> None:
    assert function_scorer(f"{__name__}:lengths")(CHATS, ["", ""]) == [4, 12]


@pytest.mark.parametrize("given", [nothing, lambda chats: [1.0, math.nan], lambda chats: [1.0, math.inf]])
def test_a_reward_that_is_not_finite_is_an_error(given: Any) -> None:
    rewards = Rewards([("function_1", 1.0, lambda chats, _: given(chats))])
    with pytest.raises(ValueError, match="reward function_1 did not return one finite number per answer"):
        rewards(CHATS, ["", ""])


# Judges


def test_a_judge_gets_conversation_answer_and_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XINGLIN_JUDGE_KEY", "secret")
    prompt = "C: {conversation}\nA: {answer}\nR: {reference}"
    with running_judge(lambda told: "I give it -7.5 of 10." if "感冒" in told else "3") as judge:
        score = judge_scorer(judge.url + "/", "big-model", prompt)
        assert score(CHATS, ["Rest.", ""]) == [-7.5, 3]
    told = {body["messages"][0]["content"] for _, body in judge.asked}
    assert told == {
        "C: 感冒怎么办？\nA: 多休息。\nR: Rest.",
        "C: user: Hello.\nassistant: Hello!\nuser: What is gout?\nA: {A} disease.\nR: ",
    }
    assert {(key, body["model"], body["temperature"]) for key, body in judge.asked} == {
        ("Bearer secret", "big-model", 0)
    }


def test_default_judge_prompt() -> None:
    with running_judge(lambda told: "10") as judge:
        judge_scorer(judge.url, "m", None)(CHATS[:1], ["Rest."])
    ((_, body),) = judge.asked
    assert "one number from 0" in body["messages"][0]["content"]
    assert "Answer:\n多休息。\n\nWhat a doctor answered, if known:\nRest.\n" in body["messages"][0]["content"]


@pytest.mark.parametrize("prompt", ["{", "{answer", '{"mark": 1}', "{question}", "{}", "{answer.x}"])
def test_unknown_braces_in_a_judge_prompt_are_refused(prompt: str) -> None:
    judge = {"judge": "http://127.0.0.1/v1", "judge_model": "m"}
    with pytest.raises(ValueError, match="judge_prompt: double every brace"):
        RewardConfig(**judge, judge_prompt=prompt)
    RewardConfig(**judge, judge_prompt='{{"mark": {answer}}}')


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the scorer, in seconds; no test waits for them."""
    found: list[float] = []
    monkeypatch.setattr("training.rl.rewards.time.sleep", found.append)
    return found


def test_a_failing_judge_is_retried_after_a_pause(pauses: list[float]) -> None:
    replies: list[str | int] = ["well done", 503, "8"]
    with running_judge(lambda told: replies.pop(0)) as judge:
        assert judge_scorer(judge.url, "m", None)(CHATS[:1], [""]) == [8]
    assert pauses == [0, 1, 5]


@pytest.mark.usefixtures("pauses")
@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("well done", "its reply contains no number"),
        (503, "HTTPError: HTTP Error 503"),
        (401, "HTTPError: HTTP Error 401: Unauthorized; set XINGLIN_JUDGE_KEY to its key"),
        (99, "BadStatusLine"),
    ],
)
def test_a_judge_that_fails_three_times_is_an_error(reply: str | int, problem: str) -> None:
    with (
        running_judge(lambda _: reply) as judge,
        pytest.raises(ServiceError, match=f"the judge at {judge.url} returned no score: {problem}"),
    ):
        judge_scorer(judge.url, "m", None)(CHATS[:1], [""])
    assert len(judge.asked) == 3


# Models


@pytest.fixture(scope="module")
def marking(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that scores, with a head drawn at random."""
    base, folder = tiny_dir / "models" / "tiny", tmp_path_factory.mktemp("models") / "marking"
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_code_of_a_reward_model_runs_only_if_trusted(
    marking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = with_own_code(marking, tmp_path / "coded")
    with pytest.raises(ConfigError) as caught:
        plain_scorer(RewardConfig(model=str(coded)))
    assert str(caught.value) == (
        "reward: coded needs Python code that comes with it: set `trust_remote_code: true` beside `model` if you "
        "have read and trust that code"
    )
    modules_below(tmp_path / "modules", monkeypatch)
    trusted = plain_scorer(RewardConfig(model=str(coded), trust_remote_code=True))
    assert trusted(CHATS, ["", ""]) == pytest.approx(model_scorer(str(marking))(CHATS, ["", ""]))


def test_trust_remote_code_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="trust_remote_code has no effect without model"):
        RewardConfig(function="rewards:length", trust_remote_code=True)


@pytest.mark.parametrize("url", ["http://me:secret@127.0.0.1/v1", "http://secret@127.0.0.1/v1"])
def test_a_judge_url_with_credentials_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="remove user and password from the URL"):
        RewardConfig(judge=url, judge_model="m")
