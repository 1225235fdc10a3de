"""What a measurement of perplexity found: numbers that follow from sums, as JSON and back, and as a table."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from student_train.evaluate.perplexity.records import (
    PerplexityReport,
    TextScore,
    format_perplexity,
    perplexity_table,
)

SCORE = TextScore(nats=1000 * math.log(8), tokens=1000, bytes=1500, start="<s>")


def make_report(**changes: Any) -> PerplexityReport:
    values: dict[str, Any] = {
        "student": "student", "teacher": None, "text": ("text.txt",), "documents": 7, "seq_len": 64, "stride": 32,
        "dtype": "float32", "device": "cpu", "student_score": SCORE, "teacher_score": None,
        "fingerprints": {"student": "a", "text": "t", "vocabulary": "v"},
    }  # fmt: skip
    return PerplexityReport(**{**values, **changes})


def test_numbers() -> None:
    assert SCORE.perplexity == pytest.approx(8)
    assert SCORE.bits_per_byte == pytest.approx(3 * 1000 / 1500)
    hopeless = TextScore(nats=1e6, tokens=1, bytes=1, start=None)
    assert hopeless.perplexity == math.inf
    assert hopeless.to_json()["perplexity"] is None


@pytest.mark.parametrize("teacher", [None, SCORE])
def test_json_and_back(teacher: TextScore | None) -> None:
    report = make_report(teacher=None if teacher is None else "t", teacher_score=teacher, notes=("note",))
    assert PerplexityReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


@pytest.mark.parametrize(
    "entry, value", [("tokens", 0), ("bytes", 1.5), ("tokens", True), ("nats", -1.0), ("nats", math.inf), ("nats", "x")]
)
def test_numbers_that_cannot_be(entry: str, value: Any) -> None:
    record = make_report().to_json()
    record["scores"]["student"][entry] = value
    with pytest.raises(ValueError, match=f"the field 'scores.student.{entry}' is"):
        PerplexityReport.from_json(record)


def test_table() -> None:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(perplexity_table("[b]name", make_report(teacher="t", teacher_score=SCORE)))
    text = captured.get()
    assert "Text under [b]name" in text
    assert text.count("8.00 │      2.0000 │       2.0794 │  1,000 │") == 2
    assert "7 documents, 1,500 bytes; windows of 64 tokens, 32 further each" in text
    assert [format_perplexity(value) for value in (7.0, 999.5, 123456.0)] == ["7.00", "999.50", "1.235e+05"]
