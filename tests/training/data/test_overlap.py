import copy

import pytest

from tests.training.data.samples import (
    ASSISTANT,
    ASSISTANT_2,
    CHAT,
    LONG_CHAT,
    LONG_PREFERENCE,
    PREFERENCE,
    SYSTEM,
    USER,
    USER_2,
    WORSE,
)
from training.data import Row, report

OTHER_ANSWER = {"messages": [USER, WORSE]}
OTHER = {"messages": [USER_2, ASSISTANT_2]}
FEEDBACK = {"prompt": [USER], "completion": [ASSISTANT], "label": True}


def test_duplicates_are_counted() -> None:
    found = report([CHAT, OTHER, copy.deepcopy(CHAT), copy.deepcopy(OTHER), copy.deepcopy(CHAT)], [])
    assert (found.train, found.duplicates, found.duplicate) == (5, 3, (3, 1))
    assert (found.evaluation, found.leaks, found.leak) == (0, 0, None)


def test_another_answer_to_the_same_question_is_not_a_duplicate() -> None:
    assert report([CHAT, OTHER_ANSWER], []).duplicates == 0


def test_rows_repeated_by_weight_are_not_duplicates() -> None:
    found = report([CHAT, OTHER] * 2, [])
    assert (found.train, found.duplicates) == (2, 0)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (CHAT, CHAT),
        (CHAT, OTHER_ANSWER),
        (CHAT, {"messages": [SYSTEM, {**USER, "content": " 感冒怎么办？\n"}, WORSE]}),
        (LONG_CHAT, CHAT),
        (LONG_CHAT, {"messages": LONG_CHAT["messages"][1:]}),
        (LONG_CHAT, LONG_PREFERENCE),
        (PREFERENCE, PREFERENCE),
        (PREFERENCE, {"prompt": [USER]}),
        (FEEDBACK, PREFERENCE),
        ({"prompt": [USER], "reference": "a"}, CHAT),
        ({"text": "a"}, {"text": "a "}),
    ],
)
def test_an_evaluation_prompt_that_is_trained_on_is_a_leak(train: Row, evaluation: Row) -> None:
    found = report([OTHER, train], [{"messages": [WORSE, WORSE]}, evaluation])
    assert (found.evaluation, found.leaks, found.leak) == (2, 1, (2, 2))


def test_general_rows_are_compared_too() -> None:
    found = report([OTHER, CHAT], [OTHER], [{"text": "a"}, OTHER_ANSWER, LONG_CHAT])
    assert (found.general, found.general_leaks, found.general_leak) == (3, 1, (2, 2))
    assert (found.evaluation, found.leaks, found.leak) == (1, 1, (1, 1))


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [(OTHER, LONG_CHAT), (CHAT, LONG_CHAT), (LONG_PREFERENCE, PREFERENCE), ({"text": "a"}, {"text": "b"})],
)
def test_other_questions_are_not_leaks(train: Row, evaluation: Row) -> None:
    assert report([train], [evaluation]).leaks == 0


def test_the_log_has_row_numbers_and_no_content(caplog: pytest.LogCaptureFixture) -> None:
    report([CHAT, OTHER, copy.deepcopy(CHAT)], [LONG_CHAT, OTHER], [OTHER_ANSWER]).log()
    assert caplog.messages == [
        "1 of 3 training rows are duplicates, such as row 3 of row 1; all are kept",
        "1 of 2 evaluation rows have the prompt of a training row, such as row 2 that of training row 2: "
        "the evaluation overestimates the quality on new prompts",
        "1 of 1 rows of general_files have the prompt of a training row, such as row 1 that of training row 1: "
        "such rows do not measure forgetting",
    ]


def test_nothing_is_logged_without_findings(caplog: pytest.LogCaptureFixture) -> None:
    report([CHAT, OTHER], [LONG_CHAT], [{"text": "a"}]).log()
    assert not caplog.messages
