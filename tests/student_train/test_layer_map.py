"""Layer mappings against tables worked out by hand from the published formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from student_train.layer_map import parse_mapping
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "teacher_layers", "student_layers", "pairs"),
    [
        ("last1", 12, 6, ((6, 12),)),
        ("last", 12, 3, ((1, 10), (2, 11), (3, 12))),
        ("uniform", 12, 6, ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))),
        # k = 2.4: 2.9, 5.3, 7.7, 10.1, 12.5 rounded down
        ("uniform", 12, 5, ((1, 2), (2, 5), (3, 7), (4, 10), (5, 12))),
        # k = 1.5 meets halves exactly: 2.0, 3.5, 5.0, 6.5
        ("uniform", 6, 4, ((1, 2), (2, 3), (3, 5), (4, 6))),
        ("uniform+last", 6, 3, ((1, 2), (1, 4), (2, 4), (2, 5), (3, 6))),
        ("last + uniform", 6, 3, ((1, 2), (1, 4), (2, 4), (2, 5), (3, 6))),
        ("1:4,2:8,3:12", 12, 3, ((1, 4), (2, 8), (3, 12))),
        ("3:12,1:4,1:4", 12, 3, ((1, 4), (3, 12))),
        ("last1+1:1", 6, 3, ((1, 1), (3, 6))),
    ],
)
def test_pairs(text: str, teacher_layers: int, student_layers: int, pairs: tuple[tuple[int, int], ...]) -> None:
    assert parse_mapping(text, teacher_layers, student_layers) == pairs


def test_uniform_is_the_rounded_multiple_for_every_depth() -> None:
    for teacher_layers in range(1, 49):
        for student_layers in range(1, teacher_layers + 1):
            step = Fraction(teacher_layers, student_layers)
            expected = tuple((i, math.floor(i * step + Fraction(1, 2))) for i in range(1, student_layers + 1))
            assert parse_mapping("uniform", teacher_layers, student_layers) == expected


@pytest.mark.parametrize("text", ["", "unifrom", "1:2,", "1-2", "1:", "a:b", "uniform+", "1:2:3", "-1:2"])
def test_unreadable_text_lists_the_names(text: str) -> None:
    with pytest.raises(SettingsError, match=r"last1, last, uniform") as caught:
        parse_mapping(text, 12, 6)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [("1:13", "layer 13 of the teacher"), ("7:12", "layer 7 of the student"), ("0:1", "layer 0 of the student")],
)
def test_layers_that_do_not_exist_are_named(text: str, what: str) -> None:
    with pytest.raises(SettingsError, match=what):
        parse_mapping(text, 12, 6)


def test_a_deeper_student_is_refused() -> None:
    with pytest.raises(SettingsError, match="at most 6 layers"):
        parse_mapping("uniform", 6, 7)
