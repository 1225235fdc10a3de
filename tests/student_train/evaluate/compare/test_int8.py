"""int8 files in a comparison: of each run the nearest to its model, mean over the runs of a row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.compare.compare import compare_runs
from student_train.evaluate.compare.table import markdown
from student_train.evaluate.onnx.records import OnnxFile, OnnxReport, OnnxTiming


def exported(run: Path, cosine: float, milliseconds: float, *, seq_len: int = 8, **changes: Any) -> None:
    def timings(median: float) -> tuple[OnnxTiming, ...]:
        common = {"seq_len": seq_len, "threads": 1, "p90_ms": 9.0, "runs": 5}
        return tuple(OnnxTiming(batch_size=size, median_ms=median * size, **common) for size in (1, 8))

    files = (
        OnnxFile(file=None, arithmetic="float32", bytes=400, timings=timings(6.0)),
        OnnxFile(file="a", arithmetic="int8 static", bytes=90, cosine=cosine - 0.1, timings=timings(1.0)),
        OnnxFile(file="b", arithmetic="int8 dynamic", bytes=100, cosine=cosine, timings=timings(milliseconds)),
    )
    report = replace(OnnxReport(student=str(run), output="logits", files=files), **changes)
    (run / "onnx.json").write_text(json.dumps({"evaluation": "onnx", **report.to_json()}))


def test_the_nearest_file_of_each_run(make_run: Any) -> None:
    runs = [make_run(f"run-{seed}", seed=seed) for seed in (0, 1)]
    other = make_run("other", method="hs")
    exported(runs[0], 0.99, 2.0)
    exported(runs[1], 0.97, 3.0)
    comparison = compare_runs([str(run) for run in (*runs, other)])
    row, without = (each.to_json()["int8"] for each in comparison.rows)
    assert row == {
        "bytes": 100, "milliseconds": 2.5, "speedup": pytest.approx((6 / 2 + 6 / 3) / 2), "cosine": pytest.approx(0.98),
    }  # fmt: skip
    assert set(without.values()) == {None}
    table = markdown(comparison)
    assert "int8 cosine" in table and "| 0.9800 |" in table
    (runs[1] / "onnx.json").unlink()  # a mean over some of the runs would be of other models
    assert compare_runs([str(run) for run in runs]).rows[0].int8.cosine is None


def test_what_is_not_alike_is_said(make_run: Any) -> None:
    one, same, other = (make_run(name, method=name) for name in ("mha", "hs", "od"))
    exported(one, 0.9, 1.0, hardware="one")
    exported(same, 0.8, 2.0, hardware="one")
    assert not any(note.startswith("int8") for note in compare_runs([str(one), str(same)]).notes)
    exported(other, 0.8, 2.0, seq_len=64, output="last_hidden_state", rows=5, hardware="two")
    notes = compare_runs([str(one), str(other)]).notes
    timings = f"{one}: 8 tokens, 1 CPU threads, one; {other}: 64 tokens, 1 CPU threads, two"
    for said in (
        f"int8 files give different outputs: {one}: logits; {other}: last_hidden_state",
        f"int8 files were timed in different ways: {timings}",
        f"int8 files were compared with their models on different rows: {one}: 0 rows of –; {other}: 5 rows of –",
    ):
        assert said in notes


def test_a_damaged_record_is_named(make_run: Any) -> None:
    from teacher_cache.errors import StudentError

    run = make_run("run")
    exported(run, 0.9, 1.0)
    record = json.loads((run / "onnx.json").read_text())
    record["files"][1]["bytes"] = "many"
    (run / "onnx.json").write_text(json.dumps(record))
    with pytest.raises(StudentError, match=r"onnx\.json' is no record of ours .*bytes"):
        compare_runs([str(run)])
