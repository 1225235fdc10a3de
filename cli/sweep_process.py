"""The processes of a sweep: each training and each evaluation is one of its own, which ends with the sweep."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from teacher_cache.errors import SettingsError

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def python() -> list[str]:
    """What stands in front of `-m cli.kdtrain` in a command."""
    # `-m` looks in the current folder first, where a package called cli may be the user's own
    return [sys.executable] if Path.cwd() == Path(__file__).resolve().parents[1] else [sys.executable, "-P"]


def run_process(command: Sequence[str], received: list[signal.Signals], must_end: Callable[[], bool]) -> int:
    """Run a command to its end, with the first signal of ours handed on once; its exit code.

    It is killed where `must_end` says so, with all that it has started: a launcher's workers would train on without it.
    """
    process = start(command)
    handed_on = False
    try:
        while True:
            try:
                return process.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if must_end():
                    _kill(process)
                elif received and not handed_on:
                    process.send_signal(received[0])
                    handed_on = True
    finally:
        if process.poll() is None:  # a second Ctrl-C: it ends at once, as it would by itself
            process.send_signal(signal.SIGINT)
            process.wait()


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that a terminal's Ctrl-C does not reach and that does not outlive this one; what it prints is dropped.

    Were it reached by what we hand on as well, the second signal would end it unsaved; and one that went on after we
    are killed would write into the same folder as the sweep that resumes.

    Raises:
        SettingsError: the system cannot start it.
    """
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=end_with_parent,
        )
    except OSError as error:
        raise SettingsError(
            f"{command[0]!r} cannot be started ({error.strerror}), so nothing can be trained by it: where the sweep's "
            "file names it as launcher, name a program that this machine can run, or leave launcher out"
        ) from error


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants, in whatever sessions they are, at once."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        top.suspend()  # it would start others in the place of those that end
        killed = set[psutil.Process]()
        while left := set(top.children(recursive=True)) - killed:
            for one in left:  # they may have started others since they were listed
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            killed |= left
    process.kill()


def failure(code: int) -> str:
    """What a sweep calls the end of a process with this code."""
    names = {one.value: one.name for one in signal.Signals}  # real-time signals have none but the first and the last
    return f"failed ({code})" if code > 0 else f"failed ({names.get(-code, f'signal {-code}')})"
