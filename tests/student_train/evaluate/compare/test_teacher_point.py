"""What a teacher costs, and how good it is, from the records of its students."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.compare.compare import compare_runs
from student_train.evaluate.compare.teacher_point import (
    teacher_bits,
    teacher_latency,
    teacher_parameters,
    teacher_rate,
)
from tests.student_train.evaluate.left_records import read_text, timed


def test_no_teacher_where_there_are_two_or_one_is_compared(make_run: Any, tmp_path: Path) -> None:
    for name, teacher in (("a", "t"), ("b", "u")):
        timed(make_run(name, scores=[0.5]), 3.0, fingerprints={"teacher": teacher})
    found = compare_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert teacher_latency(found) is None and teacher_parameters(found) is None
    alone = compare_runs([str(tmp_path / "a")])
    assert teacher_latency(alone) == 24.0 and teacher_rate(alone) is None
    same = replace(alone.rows[0].row.runs[0], weights="t")
    row = replace(alone.rows[0], row=replace(alone.rows[0].row, runs=(same,)))
    assert teacher_latency(replace(alone, rows=(row,))) is None


def test_the_teachers_bits_are_those_of_the_same_text(make_run: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        read_text(make_run(name, method="od" if name == "a" else "lm"), 2.0)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert teacher_bits(compare_runs(paths)) == pytest.approx(1.0)
    read_text(tmp_path / "b", 2.0, fingerprints={"teacher": "other", "text": "text", "vocabulary": "v"})
    assert teacher_bits(compare_runs(paths)) is None
