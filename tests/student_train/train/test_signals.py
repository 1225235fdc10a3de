"""SIGTERM and Ctrl-C: noted, told once where a launcher sends them twice, obeyed when they come again."""

import os
import signal

import pytest

from student_train.train import signals
from student_train.train.signals import noted_signals


@pytest.fixture
def earlier():
    """What handled both signals before: it counts them."""
    seen = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in numbers}
    yield seen
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_not_obeyed(earlier, number):
    with noted_signals() as received:
        assert received == []
        os.kill(os.getpid(), number)
        assert received == [number] and earlier == []
    os.kill(os.getpid(), number)
    assert received == [number] and earlier == [number], "afterwards all is as before"


def test_the_same_request_twice_is_one(earlier):
    """A terminal sends Ctrl-C to all processes, and torchrun sends it to them once more."""
    with noted_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGINT] and earlier == []


def test_a_later_one_is_obeyed(earlier, monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", -1.0)
    with noted_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGTERM] and earlier == [signal.SIGINT]
        # from then on nothing is held back any more
        os.kill(os.getpid(), signal.SIGTERM)
    assert earlier == [signal.SIGINT, signal.SIGTERM]


def test_handlers_come_back_after_an_error(earlier):
    with pytest.raises(RuntimeError), noted_signals():
        raise RuntimeError
    os.kill(os.getpid(), signal.SIGTERM)
    assert earlier == [signal.SIGTERM]
