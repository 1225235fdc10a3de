"""Students loaded as any user would load them: which can be measured on a cache, and which are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.load import check_fit, load_student, weight_files, weights_fingerprint
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.causal_models import make_causal
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


def test_students_of_the_other_kind_are_refused(tiny_teacher: Any, tiny_teacher_copy: Any, tmp_path: Path) -> None:
    """With the same words, what a masked LM says at a place would pass for a prediction of the next one."""
    causal = make_causal(tmp_path / "causal", "llama")
    manifest = make_manifest()
    causal_manifest = replace(manifest, teacher=replace(manifest.teacher, kind="causal-lm"))
    check_fit(load_student(causal), causal_manifest, causal)
    masked = tiny_teacher_copy("bert")
    with pytest.raises(StudentError, match="is a masked LM, and the teacher of this cache, 'tiny', a causal LM"):
        check_fit(load_student(masked), causal_manifest, masked)
    with pytest.raises(StudentError, match="is a causal LM, and the teacher of this cache, 'tiny', a masked LM"):
        check_fit(load_student(causal), manifest, causal)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_too_few_positions_are_refused(tiny_teacher: Any, family: str) -> None:
    folder = tiny_teacher(family)
    check_fit(load_student(folder), make_manifest(seq_len=64), folder)
    with pytest.raises(StudentError, match="at most 64 positions"):
        check_fit(load_student(folder), make_manifest(seq_len=65), folder)


def test_a_student_is_ready_to_be_measured(tiny_teacher_copy: Any) -> None:
    folder = tiny_teacher_copy("bert")
    (folder / "provenance.json").write_text('{"steps": 3}')
    student = load_student(str(folder))
    assert student.folder == folder and student.provenance == {"steps": 3}
    assert not student.encoder.training and student.config.num_hidden_layers == 4
    (folder / "provenance.json").write_text("[3]")
    with pytest.raises(StudentError, match=r"provenance.json' holds \[3\] where a JSON object is expected"):
        load_student(folder)
    (folder / "provenance.json").unlink()
    assert load_student(folder).provenance == {}


def test_fingerprints_are_of_the_weights_that_are_loaded(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    old = weights_fingerprint(tmp_path)
    # safetensors are preferred, and what lies beside them counts for nothing
    for name in ("model-00002-of-00002", "model-00001-of-00002"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    assert [file.name[:11] for file in weight_files(tmp_path)] == ["model-00001", "model-00002"]
    new = weights_fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "training_args.bin").write_bytes(b"of a Trainer")
    assert weights_fingerprint(tmp_path) == new != old
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"changed")
    assert weights_fingerprint(tmp_path) != new
