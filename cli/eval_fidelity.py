"""`kdeval fidelity`: compare a student with its teacher on held-out rows of a cache.

The result goes to standard output as a table, or with --json as one JSON record; the record is also left in the
student's directory as fidelity.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.display import progress_bar, tell_loading
from cli.eval_shared import deliver, make_record, print_result
from cli.options import parse
from student_train.evaluate.fidelity.settings import FidelitySettings
from teacher_cache.errors import StudentError

if TYPE_CHECKING:
    from student_train.evaluate.fidelity.records import FidelityReport

RECORD_NAME = "fidelity.json"


def fidelity(argv: list[str]) -> int:
    """`kdeval fidelity`; returns the exit code."""
    settings = parse(FidelitySettings, argv, "kdeval fidelity")
    report = _measure(settings)
    record = _to_json(make_record("fidelity", report.to_json()))
    path = Path(settings.student).expanduser() / RECORD_NAME
    deliver(record, path, lambda: print(json.dumps(json.loads(record))) if settings.json else _print_table(report))
    return 0


def _measure(settings: FidelitySettings) -> FidelityReport:
    tell_loading()
    # imported late, so that --help need not wait for torch
    from student_train.engine.memory import explain_memory_errors
    from student_train.evaluate.fidelity.fidelity import measure_fidelity
    from teacher_cache.device import choose_device_type
    from teacher_cache.models.placing import Placement

    with explain_memory_errors("a smaller --batch-size, or --device cpu"), progress_bar("measuring", "rows") as advance:
        return measure_fidelity(
            settings.student,
            settings.cache,
            rows=settings.rows,
            exact=settings.exact,
            batch_size=settings.batch_size,
            device=choose_device_type(settings.device),
            placement=Placement.chosen(settings.device_map, settings.max_memory, settings.device),
            advance=advance,
        )


def _to_json(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, indent=2, allow_nan=False)
    except ValueError as error:
        raise StudentError(
            f"some measures of student {record['student']!r} are not finite numbers: its weights, or outputs that come "
            "from them, are NaN or infinite, so there is nothing to compare; train it anew, with a lower --lr"
        ) from error


def _print_table(report: FidelityReport) -> None:
    from student_train.evaluate.fidelity.records import fidelity_table

    print_result([fidelity_table({Path(report.student).resolve().name: report})], report.notes)
