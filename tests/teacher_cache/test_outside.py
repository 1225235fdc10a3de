"""Records of somebody else: what is read of them is bounded, and what is shown of them steers nothing."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.outside import parse_json, parse_record, visible, visible_strings


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain ümläut 漢字 🙂", "plain ümläut 漢字 🙂"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("two\nlines\r\tand", r"two\nlines\r\tand"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202ecba", r"abc\u202ecba"),
        ("\ufeffname", r"\ufeffname"),
        ("\x07\x00", r"\x07\x00"),
    ],
)
def test_what_acts_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_no_text_keeps_a_control_character(text: str) -> None:
    shown = visible(text)
    assert all(unicodedata.category(character) not in ("Cc", "Cs") for character in shown)
    assert visible(shown) == shown


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab\x1b"), inner),
    max_leaves=20,
)


@given(VALUES)
def test_values_keep_their_form(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    shown = parse_record(json.dumps(value))
    assert shown == visible_strings(value)
    assert "\x1b" not in json.dumps(shown, ensure_ascii=False)


@pytest.mark.parametrize(
    "data, what",
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"loss": NaN}', "NaN"),
        ('{"loss": -Infinity}', "-Infinity"),
        ('{"loss": 1e999}', "1e999, which is beyond all numbers"),
        ('{"a": [{"step": 1, "loss": 2, "step": 1}]}', "'step' twice in one object"),
        ("{", "Expecting"),
        (b"\xff\xfe\xff", "decode"),
        (b" " * 101, "101 bytes"),
    ],
)
def test_what_is_no_record_is_a_value_error(data: str | bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_json(data, most_bytes=100 if len(data) == 101 else 2**20)
