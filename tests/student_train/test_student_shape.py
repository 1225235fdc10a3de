"""`--student` as text: shapes, folders, and what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from student_train.student_shape import AskedShape, StudentShape, read_shape, read_student
from teacher_cache.errors import SettingsError


def shape(layers: int, hidden_size: int, heads: int, intermediate_size: int) -> StudentShape:
    return StudentShape(layers=layers, hidden_size=hidden_size, heads=heads, intermediate_size=intermediate_size)


@pytest.mark.parametrize(
    ("text", "teacher_heads", "expected"),
    [
        ("3x384", None, shape(3, 384, 12, 1536)),
        ("3x384", 6, shape(3, 384, 6, 1536)),
        ("3x100", 12, shape(3, 100, 2, 400)),  # 12 does not divide 100, nor does 3
        ("6x768:8", 12, shape(6, 768, 8, 3072)),
        ("6x768:12:2000", None, shape(6, 768, 12, 2000)),
    ],
)
def test_reading_a_shape(text: str, teacher_heads: int | None, expected: StudentShape) -> None:
    assert read_shape(text).completed(teacher_heads=teacher_heads) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "3x",
        "x384",
        "3x384:",
        "3x384:12:",
        "3*384",
        "3x384:12:1536:",
        "3x384:12:1536:1:1",
        "3x384:12:1536:0",
        "0x384",
        "3x0",
    ],
)
def test_unreadable_shapes_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="neither a shape nor a folder") as caught:
        read_shape(text)
    assert repr(text) in str(caught.value)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SettingsError, match=r"5 attention heads do not divide the width 384.* is 4$"):
        read_shape("3x384:5")


def test_key_value_heads_are_part_of_a_shape() -> None:
    whole = StudentShape(layers=6, hidden_size=384, heads=6, intermediate_size=1024, key_value_heads=2)
    assert read_shape("6x384:6:1024:2").completed() == whole
    assert str(whole) == "6x384:6:1024:2"
    # as many as heads is what a shape says without them
    assert str(read_shape("6x384:6:1024:6").completed(teacher_heads=8, teacher_key_value_heads=2)) == "6x384:6:1024"


@pytest.mark.parametrize(
    ("asked", "heads", "key_heads", "found"),
    [
        ("6x576", 9, 3, "6x576:9:2304:3"),
        ("6x384", 9, 3, "6x384:12:1536:4"),
        ("6x384:8", 9, 3, "6x384:8:1536"),  # 3 do not divide 8
        ("6x384:12", 32, 4, "6x384:12:1536:3"),  # 8 do not divide 12, but 4 do
        ("6x384:8", 9, 1, "6x384:8:1536:1"),
        ("6x384:8", 9, None, "6x384:8:1536"),
        ("6x384:8:1536:2", 9, 3, "6x384:8:1536:2"),
    ],
)
def test_heads_share_keys_in_the_teachers_proportion(asked: str, heads: int, key_heads: int | None, found: str) -> None:
    assert str(read_shape(asked).completed(teacher_heads=heads, teacher_key_value_heads=key_heads)) == found


@pytest.mark.parametrize(
    ("text", "nearest"), [("6x384:6:1024:4", "3 or 6"), ("6x384:6:1024:5", "3 or 6"), ("6x384:6:1024:7", "6")]
)
def test_key_value_heads_must_divide_the_heads(text: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=rf"key/value heads do not divide the 6 .*; {nearest} would do$"):
        read_shape(text)


def test_a_student_is_a_shape_or_a_folder_or_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_student(None) is None
    assert read_student("3x384:6") == AskedShape(text="3x384:6", layers=3, hidden_size=384, heads=6)
    assert read_student(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert read_student("~/model") == tmp_path / "model"
    # what reads as a shape is one, whatever folders there are
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2x16").mkdir()
    assert read_student("2x16") == AskedShape(text="2x16", layers=2, hidden_size=16)


@pytest.mark.parametrize("text", ["3xx384", "no/such/folder", ""])
def test_what_is_neither_is_refused_as_both(text: str) -> None:
    with pytest.raises(
        SettingsError, match="neither a shape nor a folder that exists: .*or the path of a Hugging Face"
    ):
        read_student(text)
