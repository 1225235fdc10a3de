r"""Standard input, output and error as commands need them, wherever they were started.

A stream that was closed (`2>&-`) is put on the null device, so that no file that is opened later gets its number and
with it what is printed. What the encoding of a terminal lacks is written out (`\xb1`). A report of progress that cannot
be written, as nobody reads standard error any more or its disk is full, is dropped: work goes on. A result that cannot
be written is one message, or `BrokenPipeError` where nobody reads it.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from teacher_cache.errors import SettingsError


def prepare_streams() -> None:
    """Put the streams of this process in order; those that somebody has put in their place stay."""
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDWR), "r", encoding="utf-8", closefd=False)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _prepared(sys.stdout, _Results)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _prepared(sys.stderr, _Progress)


def discard(number: int) -> None:
    """Let what is still to be written to a file number, such as at the end of the process, go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


class _Results(io.FileIO):
    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            discard(self.fileno())
            raise SettingsError(
                f"standard output cannot be written ({error.strerror}): the result is not shown, or not whole; records "
                "are written before; make room there, or send it somewhere else"
            ) from error


class _Progress(io.FileIO):
    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            discard(self.fileno())
            return len(data)


def _prepared(stream: TextIO | None, kind: type[io.FileIO]) -> TextIO:
    if stream is None:
        # the lowest number that is free: that of the stream
        number, encoding = os.open(os.devnull, os.O_RDWR), "utf-8"
    else:
        number, encoding = stream.fileno(), stream.encoding
    raw = kind(number, "w", closefd=False)
    unbuffered = isinstance(getattr(stream, "buffer", None), io.FileIO)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )
