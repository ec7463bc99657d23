import logging
import sys

import pytest

from training.runs import progress
from training.runs.progress import Meter


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_line_is_logged_every_few_seconds(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "training")
    meter = Meter("doctor", 100)
    for step in range(1, 13):
        clock.now += 1
        meter.update(step, 1 / step)
    meter.close()
    assert caplog.messages == [
        "doctor: step 6 of 100, loss 0.167, 1.0 steps/s, 94 s left",
        "doctor: step 12 of 100, loss 0.083, 1.0 steps/s, 88 s left",
    ]


def test_time_left_counts_only_the_steps_of_this_run(clock: Clock) -> None:
    meter = Meter("doctor", 100, first_step=50)
    assert meter.eta_seconds() == 0.0
    clock.now += 20
    meter.update(60)
    assert meter.eta_seconds() == 80.0


def test_on_a_terminal_a_bar_shows_loss_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    meter = Meter("doctor", 10)
    meter.update(4)
    meter.update(10, 0.25)
    meter.close()
    bar = capsys.readouterr().err.split("\r")[-1]
    assert "doctor: 100%" in bar
    assert "10/10" in bar
    assert "loss 0.250" in bar
    assert "step/s" in bar or "s/step" in bar


def test_parallel_processes_draw_on_separate_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_place", 2)
    meter = Meter("doctor", 10)
    assert capsys.readouterr().err.startswith("\n\n")
    meter.close()
