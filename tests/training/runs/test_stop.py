import signal

import pytest

from training.runs.stop import SIGNALS, Stop


@pytest.mark.parametrize("asked", SIGNALS)
def test_a_signal_is_heard_and_nothing_else_happens(asked: signal.Signals) -> None:
    stop = Stop()
    assert not stop.is_asked
    with stop.listening():
        signal.raise_signal(asked)
        assert stop.is_asked


def test_a_second_interrupt_does_not_wait() -> None:
    stop = Stop()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_request_to_terminate_waits_as_the_first(first: signal.Signals) -> None:
    """A terminal's Ctrl-C reaches a pipeline's processes, and then the pipeline tells them too."""
    stop = Stop()
    with stop.listening():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_asked


def test_afterwards_signals_mean_what_they_meant() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), Stop().listening():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
