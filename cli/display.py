"""What commands show while they work, on standard error."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teacher_cache.wording import format_bytes

_BAR_WIDTH, _SHORTEST_BAR = 24, 8
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether commands of this process keep their progress to themselves (-q)."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether -q was given."""
    return _quiet


def tell_loading(what: str = "PyTorch") -> None:
    """The first sign of life of a command, before it imports what takes seconds; of several processes the first's."""
    if os.environ.get("RANK", "0") == "0":
        StatusLine().note(f"loading {what}")


class StatusLine:
    """What is going on, on standard error: a line that renews itself on a terminal, a line now and then elsewhere."""

    seconds_between_lines = 10.0

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.last_line = 0.0
        self.live = sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if not _quiet:
            print(("\r\033[K" if self.live else "") + text, file=sys.stderr, flush=True)

    def show(self, text: str, *, last: bool = False) -> None:
        """Print a line that the next one takes the place of; the `last` one stays."""
        if _quiet:
            return
        if self.live:
            # a line that breaks could not be written over
            shown = text if last else text[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{shown}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.monotonic() - self.last_line >= self.seconds_between_lines:
            self.last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def show_share(self, done: int, total: int, text: str, *, last: bool = False) -> None:
        """`show`, on a terminal with a bar in front of the text where there is room for one."""
        width = min(_BAR_WIDTH, shutil.get_terminal_size().columns - len(text) - 3)
        if self.live and not last and not _quiet and width >= _SHORTEST_BAR:
            print(f"\r\033[K{_bar(done, total, width)} {text}", end="", file=sys.stderr, flush=True)
        else:
            self.show(text, last=last)


def _bar(done: int, total: int, width: int) -> str:
    from rich.console import Console
    from rich.progress_bar import ProgressBar

    console = Console(stderr=True)
    with console.capture() as captured:
        console.print(ProgressBar(completed=done, total=max(total, 1), width=width), end="")
    return captured.get()


class BuildDisplay(StatusLine):
    """Progress of a build."""

    def __init__(self, doing: str = "loading the teacher") -> None:
        super().__init__()
        self.first_rows: int | None = None
        self.note(doing)

    def tokenised(self, documents: int, tokens: int) -> None:
        """Show how much of the corpus has been read."""
        self.show(f"reading the corpus: {documents} documents, {tokens} tokens")

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        """Show rows, rate and remaining time."""
        now = time.monotonic()
        if self.first_rows is None:
            self.first_rows, self.started = rows, now
        seconds = now - self.started
        rate = (rows - self.first_rows) / seconds if seconds > 0 else 0.0
        left = f"{(total - rows) / rate:.0f} s left" if rate else "estimating"
        share = f"{rows}/{total} rows ({100 * rows / total:.0f}%)"
        text = f"{share}, {rate:.1f} rows/s, {format_bytes(written_bytes)} written, {left}"
        self.show_share(rows, total, text, last=rows == total)


@contextmanager
def progress_bar(doing: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, which goes away at the end; gives what is told so many of how many `unit` are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=_quiet), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
