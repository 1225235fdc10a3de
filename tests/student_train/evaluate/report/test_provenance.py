"""Where a run comes from, as its report says it: the cache, the versions, every setting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from student_train.evaluate.report import provenance as section_of
from student_train.evaluate.report.html import Html, page, section
from student_train.evaluate.report.provenance import provenance
from student_train.evaluate.report.reproduce import reproduce
from student_train.evaluate.run_records import read_run
from tests.student_train.evaluate.left_records import saved, write
from tests.student_train.evaluate.report.pages import Page


def read(parts: list[Html]) -> str:
    """The words of the section."""
    return Page(page("title", [section("it", "It", parts)])).text["it"]


def test_provenance(make_run: Any) -> None:
    run = make_run("run", mapping="last", weights=None, json=True)
    path = run / "provenance.json"
    record = json.loads(path.read_text())
    record["cache"] |= {"rows": 1000, "teacher": {"name": "the teacher", "weights_sha256": "t"}}
    record |= {
        "objective": {"hs": {"pairs": [[1, 2], [2, 4]], "relation_heads": 8}},
        "held_out_rows": {"count": 20},
        "software": {"torch": "2.13"},
    }
    write(path, record)
    text = read(provenance(read_run(str(run))))
    for said in ("the teacher", "1,000, of which 20 were held out", "torch 2.13", "its contentsc"):
        assert said in text
    assert "hspairs: 1 → 2, 2 → 4; relation heads: 8" in text
    assert "--mappinglast" in text and "--weights–" in text and "--cachecache.zarr" in text
    assert "its weightst" in text
    write(path, record | {"cache": record["cache"] | {"imported": "vllm"}})
    known = read(provenance(replace(read_run(str(run)), weights=None)))
    assert "its weights" not in known, "an import knows no weights"
    # how it printed is no setting of a training
    assert "--json" not in text


def test_a_model_from_elsewhere_has_none(tiny_teacher: Any) -> None:
    records = read_run(str(tiny_teacher("bert")))
    assert "was not trained by kdtrain" in read(provenance(records))
    assert "No record names a command." in read(reproduce(records))


def test_of_a_fine_tuned_model_it_is_that_of_its_student(make_run: Any, tmp_path: Path) -> None:
    base = json.loads((make_run("run", mapping="last") / "provenance.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    saved(model, 0.9, base=base | {"git_revision": "abc"})
    text = read(provenance(read_run(str(model))))
    assert "kdeval finetune made this model of a student" in text and "--mappinglast" in text and "its weightsw" in text
    assert "At revision abc" in read(reproduce(read_run(str(model))))


def test_words_for_what_a_method_compares() -> None:
    assert section_of._method_in_words({"a_b": [1, 2], "pairs": [[1, 2]]}) == "a b: 1, 2; pairs: 1 → 2"
    assert section_of._method_in_words([]) == "" and section_of._method_in_words(0.5) == "0.5"
