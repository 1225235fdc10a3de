"""Sizes, times, ranges, long lists and close names as messages write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.wording import did_you_mean, format_bytes, format_duration, format_ranges, or_nothing, some


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


@pytest.mark.parametrize("numbers, text", [([], ""), ([7], "7"), ([3, 4, 5, 9], "3-5, 9"), ([0, 1, 3, 4], "0-1, 3-4")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert format_ranges(numbers) == text


@given(st.sets(st.integers(0, 60)).map(sorted))
def test_ranges_name_every_number_once(numbers: list[int]) -> None:
    found = []
    for part in filter(None, format_ranges(numbers).split(", ")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == numbers


@given(names=st.lists(st.text("abc", min_size=1), max_size=9), most=st.integers(1, 9))
def test_long_lists_are_cut_and_counted(names: list[str], most: int) -> None:
    text = some(names, most)
    if len(names) <= most:
        assert text == ", ".join(names)
    else:
        assert text == f"{', '.join(names[:most])} and {len(names) - most} more"


def test_nothing_has_a_name() -> None:
    assert [or_nothing(value) for value in (None, 0, "", "a")] == ["nothing", "0", "''", "'a'"]
