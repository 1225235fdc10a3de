"""What a measurement of latency found: as JSON, and as tables for people."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from student_train.evaluate.latency.generation_records import name_place
from student_train.evaluate.latency.records import (
    LatencyReport,
    Measurement,
    ModelSize,
    latency_tables,
)

ALONE = Measurement(
    backend="pytorch", device="cpu", dtype="float32", threads=2, batch_size=1, seq_len=128, median_ms=4.0, p90_ms=12.34,
    p99_ms=1234.5, runs=9,
)  # fmt: skip
BESIDE = replace(ALONE, teacher_median_ms=10.0)
SIZE = ModelSize(parameters=22_500_000, embedding_parameters=12_000_000, bytes=90_000_000)


def report_of(*measurements: Measurement, **changes: Any) -> LatencyReport:
    values = {"teacher": None, "teacher_size": None, "onnx_max_error": None, "hardware": {"cpu": "one"}}
    return LatencyReport(student="student", student_size=SIZE, measurements=measurements, **{**values, **changes})


def render(report: LatencyReport) -> str:
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(latency_tables("student", report))
    return captured.get()


def test_json() -> None:
    teacher = replace(SIZE, parameters=278_000_000)
    report = report_of(BESIDE, ALONE, teacher="teacher", teacher_size=teacher, onnx_max_error=1e-6, notes=("note",))
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    sizes = [record[name] for name in ("parameters", "embedding_parameters", "bytes")]
    assert sizes == [22_500_000, 12_000_000, 90_000_000]
    assert record["teacher_parameters"] == 278_000_000
    assert [each["speedup"] for each in record["measurements"]] == [2.5, None]
    assert record["measurements"][0]["teacher_median_ms"] == 10.0 and record["notes"] == ["note"]
    alone = report_of(ALONE).to_json()
    assert alone["teacher_parameters"] is alone["teacher_bytes"] is alone["onnx_max_error"] is None


def test_the_teachers_columns_are_there_where_it_was_measured() -> None:
    text = render(report_of(BESIDE))
    assert "pytorch, CPU (2 threads), float32" in text
    (line,) = [line for line in text.splitlines() if " 128 " in line]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["1", "128", "4.00", "12.3", "1234", "9", "10.0", "2.50x"]
    assert "speed-up" not in render(report_of(ALONE))


def test_a_table_for_each_place() -> None:
    places = (replace(ALONE, seq_len=512), replace(ALONE, threads=1), replace(ALONE, device="cuda"))
    text = render(report_of(ALONE, *places))
    assert [text.count(title) for title in ("CPU (2 threads)", "CPU (1 thread)", "pytorch, GPU")] == [1, 1, 1]
    assert text.count("batch") == 3


def test_sizes_stand_below() -> None:
    text = render(report_of(ALONE, teacher="t", teacher_size=SIZE, onnx_max_error=1.2e-6))
    assert "student: 22.5M parameters, 10.5M without embeddings, 90.0 MB on disk" in text
    assert "teacher: 22.5M parameters" in text and "ONNX Runtime differs from PyTorch by at most 1.2e-06" in text
    assert "teacher:" not in render(report_of(ALONE))


@pytest.mark.parametrize("device, threads, name", [("cuda", 1, "GPU"), ("cpu", 1, "CPU (1 thread)")])
def test_places(device: str, threads: int, name: str) -> None:
    assert name_place(device, threads) == name
