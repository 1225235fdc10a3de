"""SIGTERM and Ctrl-C, noted instead of obeyed, so that a training can save itself first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """While inside, SIGTERM and SIGINT are noted in the list; the second one is handled as it was before."""
    received: list[signal.Signals] = []
    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in handled}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in handled:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
