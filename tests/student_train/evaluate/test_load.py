"""Students loaded as any user would load them: which can be measured on a cache, and which are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.load import check_fit, load_student
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.manifests import make_manifest


def test_a_base_model_has_no_head(tiny_teacher: Any) -> None:
    assert load_student(tiny_teacher("bert", head=False)).head is None
    assert load_student(tiny_teacher("bert")).head is not None


def test_no_such_student(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no student directory"):
        load_student(tmp_path / "nowhere")
    with pytest.raises(StudentError, match="no Hugging Face model folder"):
        load_student(tmp_path)


def test_damaged_provenance(tiny_teacher_copy: Any) -> None:
    folder = tiny_teacher_copy("bert")
    (folder / "provenance.json").write_text('{"cache": ')
    with pytest.raises(StudentError, match="cannot be read as JSON"):
        load_student(folder)


def test_other_vocabularies_are_refused(tiny_teacher: Any, tiny_teacher_copy: Any) -> None:
    teacher = tiny_teacher("bert")
    check_fit(load_student(teacher), make_manifest(), teacher)
    with pytest.raises(StudentError, match="210 vocabulary entries, the teacher 200"):
        check_fit(load_student(tiny_teacher("bert", vocab_size=210)), make_manifest(), teacher)
    # same number of entries, other order of the special tokens
    student = tiny_teacher_copy("bert")
    for file in tiny_teacher("xlm-roberta").glob("tokenizer*"):
        shutil.copy(file, student)
    with pytest.raises(StudentError, match="other ids"):
        check_fit(load_student(student), make_manifest(), teacher)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_too_few_positions_are_refused(tiny_teacher: Any, family: str) -> None:
    folder = tiny_teacher(family)
    check_fit(load_student(folder), make_manifest(seq_len=64), folder)
    with pytest.raises(StudentError, match="at most 64 positions"):
        check_fit(load_student(folder), make_manifest(seq_len=65), folder)
