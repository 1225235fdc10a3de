"""Sizes, times and close names as messages write them."""

from __future__ import annotations

import pytest

from teacher_cache.wording import did_you_mean, format_bytes, format_duration


@pytest.mark.parametrize(
    "size, text", [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (3.2e15, "3200.0 TB")]
)
def test_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.2, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5900, "98 min"),
        (6000, "1 h 40 min"),
        (86_400, "24 h 0 min"),
        (180_000, "2 d 2 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "given, text",
    [
        ("lsat", "did you mean last? Give"),
        ("unifrom", "did you mean uniform? Give"),
        ("xyz", "give"),
        ("", "give"),
    ],
)
def test_names_that_are_close_to_what_was_given_are_offered(given: str, text: str) -> None:
    assert did_you_mean(given, ["last", "uniform", "skip"]) == text
