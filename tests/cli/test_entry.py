"""Exit codes and what a user sees of an error."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from cli.entry import run_command
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


def test_a_reader_that_went_away_is_no_defect() -> None:
    code = "import sys; from cli.entry import run_command; sys.exit(run_command(lambda a: print('x'), 'kdcache', []))"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")
