"""`kdeval latency`: time one forward pass of a student, beside its teacher's.

The result goes to standard output as a table, or with --json as one JSON record; the record is also left in the
student's directory as latency.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli.display import StatusLine, tell_loading
from cli.eval_shared import deliver, make_record, print_result
from cli.options import parse
from student_train.evaluate.latency.settings import LatencySettings

if TYPE_CHECKING:
    from student_train.evaluate.latency.records import LatencyReport

RECORD_NAME = "latency.json"


def latency(argv: list[str]) -> int:
    """`kdeval latency`; returns the exit code."""
    settings = parse(LatencySettings, argv, "kdeval latency")
    report = _measure(settings)
    record = make_record("latency", report.to_json())
    printed, written = (json.dumps(record, indent=indent, allow_nan=False) for indent in (None, 2))
    path = Path(settings.student).expanduser() / RECORD_NAME
    deliver(written, path, lambda: print(printed) if settings.json else _print_table(report))
    return 0


def _measure(settings: LatencySettings) -> LatencyReport:
    tell_loading()
    # imported late, so that --help need not wait for torch
    from student_train.engine.memory import explain_memory_errors
    from student_train.evaluate.latency.latency import measure_latency
    from teacher_cache.device import choose_device_type

    status = StatusLine()
    with_gpu = choose_device_type(settings.device) == "cuda"
    devices = ("cpu", "cuda") if with_gpu and settings.device == "auto" else ("cuda",) if with_gpu else ("cpu",)
    with explain_memory_errors("smaller --batch-sizes or --lengths, or --device cpu"):
        report = measure_latency(settings, devices=devices, show=status.show)
    status.show(f"measured {len(report.measurements or report.generation)} combinations", last=True)
    return report


def _print_table(report: LatencyReport) -> None:
    from student_train.evaluate.latency.records import latency_tables

    print_result([latency_tables(Path(report.student).resolve().name, report)], report.notes)
