"""SIGTERM and Ctrl-C, noted instead of obeyed, so that a training can save itself first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_REQUEST_SECONDS = 3.0


@contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """While inside, SIGTERM and SIGINT are noted in the list; a later one is handled as it was before.

    One that follows at once is the same request: launchers hand on what a terminal has sent to all processes already.
    """
    received: list[signal.Signals] = []
    first = 0.0
    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in handled}

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if not received:
            received.append(signal.Signals(number))
            first = now
        elif now - first > SAME_REQUEST_SECONDS:
            for each, handler in before.items():
                signal.signal(each, handler)
            os.kill(os.getpid(), number)

    for number in handled:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
