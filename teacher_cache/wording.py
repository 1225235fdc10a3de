"""Sizes, times, ranges, long lists and names that are close to a misspelt one, as messages write them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_LONGEST_COMMAND = 100_000


def format_bytes(size: float) -> str:
    """`12.3 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 5 min` or `2 d 4 h`: two significant units at most."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def format_ranges(numbers: Sequence[int]) -> str:
    """`3-5, 9` for 3, 4, 5, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def some(names: Sequence[str], most: int = 4) -> str:
    """`a, b, c, d and 3 more`: the first few of them, and how many there are beside."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """`did you mean last or last1? Give` where names are close to what was given, else `give`: a list follows it."""
    close = get_close_matches(given, list(names), n=2)
    return f"did you mean {' or '.join(close)}? Give" if close else "give"


def command_line() -> str:
    """What was typed, as a shell takes it; of a very long line, such as thousands of file names, the first part."""
    typed = shlex.join(sys.argv)
    return typed if len(typed) <= _LONGEST_COMMAND else f"{typed[:_LONGEST_COMMAND]} ..."


def or_nothing(value: Any) -> str:
    """A value as messages about settings write it; None is `nothing`."""
    return "nothing" if value is None else repr(value)
