"""Layer numbering against the paper's formulas, and the default student."""

from __future__ import annotations

import math

import pytest

from teacher_cache.contract.layers import (
    default_relation_heads,
    last_layers,
    parse_layers,
    read_layers,
    uniform_layers,
)
from teacher_cache.errors import SettingsError


@pytest.mark.parametrize("teacher", range(1, 30))
def test_uniform_is_the_rounded_multiple(teacher: int) -> None:
    for student in range(1, teacher + 1):
        want = tuple(math.floor(i * teacher / student + 0.5 + 1e-9) for i in range(1, student + 1))
        assert uniform_layers(teacher, student) == want
        assert want[-1] == teacher
        assert last_layers(teacher, student) == tuple(range(teacher - student + 1, teacher + 1))


@pytest.mark.parametrize(
    "text, layers",
    [
        ("2,4,6", (2, 4, 6)),
        ("all", tuple(range(1, 13))),
        ("uniform:6+last", (2, 4, 6, 7, 8, 9, 10, 11, 12)),
        ("uniform+last", (2, 4, 6, 7, 8, 9, 10, 11, 12)),
        ("last:2", (11, 12)),
        ("0", (0,)),
        ("uniform:4+1", (1, 3, 6, 9, 12)),
    ],
)
def test_parse_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 12) == layers


@pytest.mark.parametrize("text, message", [("13", "layer 13, the teacher"), ("uniform:13", "13 layers")])
def test_bad_layers_are_refused(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_layers(text, 12)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x", "cannot be read at 'x': give numbers"),
        ("", "cannot be read at ''"),
        ("2,", "cannot be read at ''"),
        ("unifrom:6", "cannot be read at 'unifrom:6': did you mean uniform"),
        ("uniform:six", "cannot be read at 'six'"),
        ("uniform:0", "a student of 0 layers: give 1 or more"),
        ("4,-1", "names layer -1: layers are numbered from 1, and 0 is the embedding output"),
    ],
)
def test_layers_that_can_be_of_no_teacher_are_refused_as_text(text: str, message: str) -> None:
    for refused in (lambda: read_layers(text), lambda: parse_layers(text, 12)):
        with pytest.raises(SettingsError, match=message):
            refused()


def test_default_relation_heads() -> None:
    assert default_relation_heads(1024, 768) == 64
    assert default_relation_heads(768, 768) == 48
    assert default_relation_heads(384, 384) == 24
    assert default_relation_heads(768, 312) == 24
