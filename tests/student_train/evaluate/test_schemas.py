"""What records of measurements must be: schemas follow the records, and files are refused by their name and entry."""

from __future__ import annotations

import json
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate import schemas
from student_train.evaluate.fidelity import records as fidelity
from student_train.evaluate.finetune.records import SeedResult
from student_train.evaluate.latency import generation_records as generation
from student_train.evaluate.lm_eval import records as lm_eval
from student_train.evaluate.perplexity import records as perplexity
from student_train.evaluate.schemas import PerplexitySchema, check_record, read_object
from teacher_cache.errors import StudentError


@pytest.mark.parametrize(
    "schema, records",
    [
        (schemas.FidelitySchema, [fidelity.FidelityReport]),
        (schemas.RelationSchema, [fidelity.RelationFidelity]),
        (schemas.HiddenSchema, [fidelity.HiddenFidelity]),
        (schemas.DistributionSchema, [fidelity.DistributionFidelity]),
        (schemas.GenerationSchema, [generation.GenerationSetup, generation.GenerationTiming]),
        (schemas.TextScoreSchema, [perplexity.TextScore]),
        (schemas.LmEvalSchema, [lm_eval.LmEvalReport]),
        (schemas.TaskResultSchema, [lm_eval.TaskResult]),
        (schemas.MetricSchema, [lm_eval.Metric]),
    ],
)
def test_every_field_of_a_record_is_described_and_no_other(schema: Any, records: list[Any]) -> None:
    assert set(schema.model_fields) == {field.name for record in records for field in fields_of(record)}


def test_records_whose_parts_are_called_otherwise() -> None:
    scores = {"student_score", "teacher_score"}
    assert {field.name for field in fields_of(perplexity.PerplexityReport)} - scores == {
        *PerplexitySchema.model_fields
    } - {"scores"}
    kept = {field.name for field in fields_of(SeedResult)} - {"seed", "learning_rate"}
    assert set(schemas.ResultSchema.model_fields) == kept


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="nowhere.json' cannot be read as JSON"):
        read_object(tmp_path / "nowhere.json")
    (tmp_path / "record.json").write_text('{"seeds": [0]}')
    assert read_object(tmp_path / "record.json") == {"seeds": [0]}
    for text, said in (
        ('{"seeds": [', "cannot be read as JSON"),
        ('{"seeds": [0], "seeds": [1]}', "'seeds' twice in one object"),
        ('{"loss": 1e999}', "beyond all numbers"),
        # a large value does not fill the screen
        (json.dumps(list(range(1000))), "where an object is expected"),
    ):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(StudentError, match=said) as refusal:
            read_object(tmp_path / "record.json")
        assert len(str(refusal.value)) < 400 and "record.json" in str(refusal.value)


def test_a_record_is_refused_by_file_and_field() -> None:
    with pytest.raises(StudentError, match="run/latency.json' is no record of ours.*'parameters' is True.*measure"):
        check_record(schemas.LatencySchema, Path("run/latency.json"), {
            "evaluation": "latency", "measurements": [], "parameters": True,
        })  # fmt: skip


@pytest.mark.parametrize(
    "change, said",
    [({"first_row": 9}, "'first_row' 9 is beyond 'last_row' 8"), ({"held_out": 1}, "'held_out' is 1: it must be true")],
)
def test_fidelity_that_cannot_be(change: dict[str, Any], said: str) -> None:
    report = fidelity.FidelityReport(student="s", cache="c", first_row=1, last_row=8, held_out=True, tokens=100)
    assert fidelity.FidelityReport.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match=said):
        fidelity.FidelityReport.from_json({**report.to_json(), **change})
