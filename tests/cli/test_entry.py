"""Exit codes and what a user sees of an error."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

from cli.display import StatusLine
from cli.entry import run_command, stops_on_sigterm
from teacher_cache.errors import CorpusError


def fail(argv: list[str]) -> None:
    raise CorpusError("there is no text in 'x.txt'")


def test_success_and_own_exit_codes() -> None:
    assert run_command(lambda argv: None, "kdtrain", []) == 0
    assert run_command(lambda argv: 143, "kdtrain", []) == 143


def test_user_error_is_one_message(capsys) -> None:
    assert run_command(fail, "kdcache build", []) == 1
    captured = capsys.readouterr()
    assert captured.err == "kdcache build: there is no text in 'x.txt'\n"
    assert captured.out == ""


def test_debug_keeps_the_traceback() -> None:
    with pytest.raises(CorpusError):
        run_command(fail, "kdcache", ["--debug"])


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 // 0, "kdcache", [])


def test_interrupt(capsys) -> None:
    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    assert run_command(interrupt, "kdtrain", []) == 130
    assert capsys.readouterr().err == "kdtrain: interrupted\n"


def test_own_flags_are_taken_out_and_the_rest_kept_in_order() -> None:
    seen: list[str] = []

    def main(argv: list[str]) -> None:
        seen.extend(argv)

    run_command(main, "kdcache", ["info", "-v", "x.zarr", "--debug", "--json", "--out=a"])
    assert seen == ["info", "x.zarr", "--json", "--out=a"]


@pytest.mark.parametrize("argv", [["--version"], ["build", "--version"], ["build", "--teacher", "--version", "-v"]])
def test_version_is_answered_wherever_it_stands(argv: list[str], capsys) -> None:
    assert run_command(fail, "kdcache", argv) == 0
    assert capsys.readouterr().out == f"kdcache {version('kdcache')}\n"


STOPPED = "kdcache build: stopped; committed blocks are safe, run the same command to continue\n"
SWALLOW = """
import os, signal, sys, weakref
from cli.display import StatusLine
from cli.entry import run_command, stops_on_sigterm

class Thing: ...

def swallowed(number):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    del thing  # Python prints what a callback raises, and goes on

def main(argv):
    with stops_on_sigterm("kdcache build") as stopping:
        if argv[0] == "loaded":
            stopping.go_on()
        swallowed(int(argv[1]))
        if argv[0] == "loaded":
            print("went on")
    print("done")

sys.exit(run_command(main, "kdcache", sys.argv[1:]))
"""


@pytest.mark.parametrize("number, code, told", [(15, 143, STOPPED), (2, 130, "kdcache build: interrupted\n")])
def test_a_signal_while_a_command_loads_cannot_be_swallowed(number: int, code: int, told: str) -> None:
    command = [sys.executable, "-c", SWALLOW, "loading", str(number)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr, result.stdout) == (code, told, "")


def test_a_signal_that_was_swallowed_later_still_ends_the_command() -> None:
    command = [sys.executable, "-c", SWALLOW, "loaded", "15"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (143, "went on\n")
    assert result.stderr.startswith(STOPPED) and result.stderr.count(STOPPED) == 1


def be_stopped() -> None:
    with stops_on_sigterm("kdcache build") as stopping:
        stopping.go_on()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_blocks_are_written_leaves_as_an_exception() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        be_stopped()
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_went_away_is_no_defect() -> None:
    code = "import sys; from cli.entry import run_command; sys.exit(run_command(lambda a: print('x'), 'kdcache', []))"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def work(argv: list[str]) -> None:
    logging.getLogger("teacher_cache.storage").info("read %s", "x.zarr")
    logging.getLogger("httpx").info("of a library")
    logging.getLogger("student_train.train").warning("a warning")
    StatusLine().note("progress")
    print("result")


@pytest.mark.parametrize(
    "switch, told",
    [("-q", "WARNING student_train.train: a warning"), ("--quiet", "WARNING student_train.train: a warning"),
     ("--debug", "WARNING student_train.train: a warning progress"),
     ("-v", "S s read x.zarr WARNING student_train.train: a warning progress S s done, exit code 0")],
)  # fmt: skip
def test_how_much_is_told(switch: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Results go to standard output however loud a command is; of libraries nothing is told but warnings."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        assert run_command(work, "kdcache", [switch]) == 0
    finally:
        run_command(lambda argv: None, "kdcache", [])
    printed = capsys.readouterr()
    assert printed.out == "result\n"
    assert re.sub(r"\d+\.\d", "S", " ".join(printed.err.split())) == told


def test_quiet_and_verbose_exclude_each_other(capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        run_command(fail, "kdcache", ["-q", "-v"])
    assert left.value.code == 2 and "not allowed with" in capsys.readouterr().err
