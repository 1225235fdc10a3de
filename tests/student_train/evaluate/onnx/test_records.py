"""The record of ONNX files: to JSON and back, which int8 file counts, and what a table leaves out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from student_train.evaluate.onnx.records import OnnxFile, OnnxReport, OnnxTiming, onnx_caption, onnx_columns

TIMING = OnnxTiming(batch_size=1, seq_len=8, threads=1, median_ms=1.5, p90_ms=2.0, runs=9)
REPORT = OnnxReport(
    student="it",
    output="last_hidden_state",
    files=(
        OnnxFile(file=None, arithmetic="float32", bytes=400, timings=(TIMING,)),
        OnnxFile(file="onnx/a.onnx", arithmetic="int8 dynamic", bytes=100, cosine=0.99, timings=(TIMING,)),
        OnnxFile(file="onnx/b.onnx", arithmetic="int8 static", bytes=90, cosine=0.97, timings=(TIMING,)),
    ),
    rows=6,
    held_out=True,
    hardware="a CPU",
    notes=("a note",),
)


def test_to_json_and_back() -> None:
    written = json.loads(json.dumps(REPORT.to_json()))
    assert OnnxReport.from_json({**written, "evaluation": "onnx", "more": 1}) == REPORT
    for field, value in (("bytes", -1), ("cosine", 2.0), ("max_error", "much")):
        wrong = {**written, "files": [{**written["files"][0], field: value}], "evaluation": "onnx"}
        with pytest.raises(ValueError, match=field):
            OnnxReport.from_json(wrong)


def test_the_nearest_int8_file_counts() -> None:
    assert REPORT.int8 == REPORT.files[1]
    assert replace(REPORT, files=REPORT.files[:1]).int8 is None
    unmeasured = tuple(replace(each, cosine=None) for each in REPORT.files)
    assert replace(REPORT, files=unmeasured).int8 == unmeasured[1]


def test_columns_of_what_was_measured() -> None:
    columns = onnx_columns(REPORT)
    assert list(columns) == ["model", "size", "ms, 1 x 8", "cosine"]
    assert columns["cosine"] == ["–", "0.9900", "0.9700"] and columns["ms, 1 x 8"] == ["1.5"] * 3
    assert "6 held-out rows" in onnx_caption(REPORT) and "NMSE" not in onnx_caption(REPORT)
