"""What a model comes from: a fine-tuned one has its own scores, and the provenance of its student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.origins import read_provenance, read_saved
from student_train.evaluate.run_records import read_run
from teacher_cache.errors import StudentError
from tests.student_train.evaluate.left_records import saved


def test_a_fine_tuned_model(make_run: Any, tmp_path: Path) -> None:
    student, model = make_run("student", method="hs"), tmp_path / "model"
    base = json.loads((student / "provenance.json").read_text())
    model.mkdir()
    saved(model, 0.9125, base={**base, "command": "kdtrain --method hs"}, notes=["a note"])
    run = read_run(str(model))
    assert run.saved is not None and run.saved == read_saved(model)
    assert str(run.saved) == "sst2, seed 3, learning rate 3e-05: accuracy × 100 is 91.25 on dev"
    assert (run.saved.score, run.saved.base_weights, run.saved.notes) == (0.9125, "w", ("a note",))
    assert run.commands == ("kdtrain --method hs", "kdeval finetune --save it")
    # the student's provenance is not that of these weights
    assert run.origin_settings["method"] == "hs" and run.settings == {} == run.provenance
    assert read_run(str(student)).saved is None


def test_scores_of_test_sets_count_where_there_are_any(tmp_path: Path) -> None:
    saved(tmp_path, 0.9, measures={"dev": {"accuracy": 0.9}, "de": {"accuracy": 0.5}, "sw": {"accuracy": 0.7}})
    found = read_saved(tmp_path)
    assert found is not None and found.score == pytest.approx(0.6)
    saved(tmp_path, 0.9, measures={"dev": {"f1": 0.9}})
    assert (found := read_saved(tmp_path)) is not None and found.score is None


@pytest.mark.parametrize("base", [None, 3, {"settings": {}}, {"settings": {"steps": "many"}, "cache": {}}])
def test_a_base_that_is_no_provenance_is_none(base: Any, tmp_path: Path) -> None:
    saved(tmp_path, 0.9, base=base)
    assert (found := read_saved(tmp_path)) is not None and found.base == {}


def test_damaged_records_are_named(tmp_path: Path) -> None:
    saved(tmp_path, 0.9, seed="three")
    with pytest.raises(StudentError, match=r"finetuned\.json' is no record of ours .*'seed' is 'three'"):
        read_run(str(tmp_path))
    (tmp_path / "provenance.json").write_text("[]")
    with pytest.raises(StudentError, match=r"provenance\.json'"):
        read_provenance(tmp_path / "provenance.json")
