"""What `--positions` takes, and how much room it asks for."""

from __future__ import annotations

import pytest

from teacher_cache.contract.positions import parse_positions, places_per_row
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("all", "all"),
        ("every:4", "every:4"),
        ("every:004", "every:4"),
        ("every:1", "all"),
        ("share:0.250", "share:0.25"),
        ("share:1e-1", "share:0.1"),
        ("share:1", "all"),
        ("share:1.0", "all"),
        ("share:0.123456789", "share:0.123456789"),
        ("share:1e-7", "share:1e-07"),
    ],
)
def test_equal_choices_are_written_equally(text: str, canonical: str) -> None:
    assert parse_positions(text) == canonical
    assert parse_positions(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "every", "every:", "every:0", "every:-2", "every:1.5", "every:٣", "every:9999999999", "share:", "share:0",
     "share:-0.1", "share:1.1", "share:nan", "share:inf", "share:x", "ALL", "all:3", "0.5"],
)  # fmt: skip
def test_what_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--positions '.*' is unknown.* all, every:N .* or share:X"):
        parse_positions(text)


def test_a_slip_is_named() -> None:
    with pytest.raises(SettingsError, match=r"did you mean share\? Give all"):
        parse_positions("shares:0.5")


@pytest.mark.parametrize(
    "positions, seq_len, places",
    [
        ("all", 128, 127),
        ("every:4", 128, 32),
        ("every:1", 128, 127),
        ("every:127", 128, 1),
        ("every:500", 128, 1),
        ("share:0.25", 128, 32),
        ("share:0.001", 128, 1),
    ],
)
def test_room_for_places(positions: str, seq_len: int, places: int) -> None:
    assert places_per_row(positions, seq_len) == places
