"""Progress on standard error: a line that renews itself on a terminal, and few lines in a file."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from cli import display
from cli.display import BuildDisplay, StatusLine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the only element."""
    now = [100.0]
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_now_and_then_and_the_last_one(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    line = StatusLine()
    for text in ("first", "too soon", "later", "soon again"):
        line.show(text)
        clock[0] += 6
    line.note("a note")
    line.show("last", last=True)
    assert capsys.readouterr().err == "first\nlater\na note\nlast\n"


def test_a_terminal_gets_one_line_that_is_written_over(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = StatusLine()
    line.show("first")
    line.show("second")
    line.note("a note")
    line.show("last", last=True)
    assert terminal.getvalue() == "\r\033[Kfirst\r\033[Ksecond\r\033[Ka note\n\r\033[Klast\n"


def test_a_build_shows_its_rate_and_what_is_left(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this build alone: rows that were there before say nothing about its speed."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = BuildDisplay("opening")
    shown.tokenised(3, 400)
    shown.committed(100, 400, 0)
    clock[0] += 10
    shown.committed(200, 400, 5_000_000)
    clock[0] += 10
    shown.committed(400, 400, 9_000_000)
    lines = terminal.getvalue().replace("\n", "").split("\r\033[K")
    assert all(len(line) < 80 for line in lines)
    bars = [line.count("━") for line in lines if "━" in line]
    assert len(bars) == 2 and bars[0] < bars[1], "none once all is done"
    assert [line.lstrip("━╸╺ ") for line in lines] == [
        "",
        "opening",
        "reading the corpus: 3 documents, 400 tokens",
        "100/400 rows (25%), 0.0 rows/s, 0 B written, estimating",
        "200/400 rows (50%), 10.0 rows/s, 5.0 MB written, 20 s left",
        "400/400 rows (100%), 15.0 rows/s, 9.0 MB written, 0 s left",
    ]


def test_a_narrow_terminal_gets_no_bar_and_lines_that_do_not_break(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    line = StatusLine()
    line.show_share(1, 2, "x" * 35)
    line.show("y" * 50)
    line.show("z" * 50, last=True)
    assert terminal.getvalue().split("\r\033[K") == ["", "x" * 35, "y" * 39, "z" * 50 + "\n"]


def test_nothing_is_shown_where_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(display, "_quiet", True)
    shown = BuildDisplay("opening")
    shown.committed(1, 2, 0)
    shown.show("last", last=True)
    with display.progress_bar("measuring", "rows") as advance:
        advance(1, 2)
    assert terminal.getvalue() == ""
