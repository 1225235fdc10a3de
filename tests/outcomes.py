"""How a command ends that is run in this process: its exit code, what it printed, what it took of memory.

Each must end in time. A traceback becomes a code of its own, so that a test can say that none is right.
"""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60
"""A command that takes a tenth of a second, or two, has not ended then."""
NOISE_BYTES = 96 * 2**20
"""How much more memory a command may take than twice what it takes on the unchanged store: allocators keep some."""
COMMAND = r"kdcache|kdtrain|kdeval"
STEERING = "\x1b\\[31m|\u202e"
"""Of the texts that are put into records, what steers a terminal."""


class Hanging(BaseException):
    """A command has not ended in time; no handler of errors shall take it for one of its own."""


@contextmanager
def in_time() -> Iterator[None]:
    """Leave with `Hanging` after `SECONDS`: by a signal, which ends waiting too. Not SIGALRM: pytest has that."""

    def leave(*_: object) -> None:
        raise Hanging(f"not ended after {SECONDS} s")

    before = signal.signal(signal.SIGUSR1, leave)
    main = threading.main_thread().ident
    assert main is not None
    clock = threading.Timer(SECONDS, signal.pthread_kill, (main, signal.SIGUSR1))
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        signal.signal(signal.SIGUSR1, before)


def memory(name: str) -> int:
    """VmRSS, what the process has in memory, or VmHWM, the most that it had since `forget_peak`, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside:
        yield path, value
    for key, one in inside:
        yield from leaves(one, f"{path}.{key}".lstrip("."))


@dataclass(kw_only=True)
class Outcome:
    """How one command ended."""

    code: int | str
    printed: str
    messages: list[str]
    bytes: int


def run_one(name: str, run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> Outcome:
    capsys.readouterr()
    forget_peak()
    before = memory("VmRSS")
    try:
        with in_time():
            code: int | str = run()
    except SystemExit as leaving:
        code = f"exit {leaving.code}"
    except BaseException as error:  # noqa: BLE001 - a traceback is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        code = f"{type(error).__name__}: {str(error)[:150]} at {last.filename}:{last.lineno}"
    shown = capsys.readouterr()
    messages = [line for line in shown.err.splitlines() if re.match(COMMAND, line)]
    return Outcome(code=code, printed=shown.out, messages=messages, bytes=memory("VmHWM") - before)
