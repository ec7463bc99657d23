import signal

import pytest

from training.runs.stop import SIGNALS, Stop


@pytest.mark.parametrize("asked", SIGNALS)
def test_a_signal_only_sets_the_flag(asked: signal.Signals) -> None:
    stop = Stop()
    assert not stop.is_asked
    with stop.listening():
        signal.raise_signal(asked)
        assert stop.is_asked


def test_a_second_interrupt_raises_at_once() -> None:
    stop = Stop()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_sigterm_is_deferred(first: signal.Signals) -> None:
    """Ctrl-C in a terminal reaches the processes of a pipeline, which then also get SIGTERM from the pipeline."""
    stop = Stop()
    with stop.listening():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_asked


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), Stop().listening():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
