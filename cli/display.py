"""What commands show while they work, on standard error, and how sizes are written."""

from __future__ import annotations

import sys
import time


class BuildDisplay:
    """Progress of a build on standard error: a line that renews itself on a terminal, a line now and then elsewhere."""

    seconds_between_lines = 10.0

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_rows: int | None = None
        self.last_line = 0.0
        self.live = sys.stderr.isatty()
        self.note("loading the teacher")

    def note(self, text: str) -> None:
        """Print a line."""
        print(("\r\033[K" if self.live else "") + text, file=sys.stderr, flush=True)

    def tokenised(self, documents: int, tokens: int) -> None:
        """Show how much of the corpus has been read."""
        self._show(f"reading the corpus: {documents} documents, {tokens} tokens")

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        """Show rows, rate and remaining time."""
        now = time.monotonic()
        if self.first_rows is None:
            self.first_rows, self.started = rows, now
        seconds = now - self.started
        rate = (rows - self.first_rows) / seconds if seconds > 0 else 0.0
        left = f"{(total - rows) / rate:.0f} s left" if rate else "estimating"
        share = f"{rows}/{total} rows ({100 * rows / total:.0f}%)"
        self._show(f"{share}, {rate:.1f} rows/s, {format_bytes(written_bytes)} written, {left}", last=rows == total)

    def _show(self, text: str, *, last: bool = False) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.monotonic() - self.last_line >= self.seconds_between_lines:
            self.last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def format_bytes(size: float) -> str:
    """`12.3 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
