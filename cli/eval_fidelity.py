"""`kdeval fidelity`: compare a student with its teacher on held-out rows of a cache.

The result goes to standard output as a table, or with --json as one JSON record; the record is also left in the
student's directory as fidelity.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.evaluation import choose_device, write_record
from cli.options import parse
from student_train.evaluate.settings import EvalSettings
from teacher_cache.errors import StudentError

if TYPE_CHECKING:
    from student_train.evaluate.fidelity import Advance
    from student_train.evaluate.records import FidelityReport

RECORD_NAME = "fidelity.json"


def fidelity(argv: list[str]) -> int:
    """`kdeval fidelity`; returns the exit code."""
    settings = parse(EvalSettings, argv, "kdeval fidelity")
    report = _measure(settings)
    record = _to_json(_make_record(report))
    if settings.json:
        print(json.dumps(json.loads(record)))
    else:
        _print_table(report)
    write_record(record, Path(settings.student).expanduser() / RECORD_NAME)
    return 0


def _measure(settings: EvalSettings) -> FidelityReport:
    # imported late, so that --help need not wait for torch
    from student_train.evaluate.fidelity import measure_fidelity
    from student_train.memory import clear_memory_errors

    with clear_memory_errors("a smaller --batch-size, or --device cpu"), _progress() as advance:
        return measure_fidelity(
            settings.student,
            settings.cache,
            rows=settings.rows,
            batch_size=settings.batch_size,
            device=choose_device(settings.device),
            advance=advance,
        )


@contextmanager
def _progress() -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _make_record(report: FidelityReport) -> dict[str, Any]:
    from student_train.provenance import run_provenance

    return {"evaluation": "fidelity", **report.to_json(), **run_provenance()}


def _to_json(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, indent=2, allow_nan=False)
    except ValueError as error:
        raise StudentError(
            f"some measures of student {record['student']!r} are not finite numbers: its weights, or outputs that come "
            "from them, are NaN or infinite, so there is nothing to compare; train it anew, with a lower --lr"
        ) from error


def _print_table(report: FidelityReport) -> None:
    from rich.console import Console

    from student_train.evaluate.report import fidelity_table

    console = Console()
    console.print(fidelity_table({Path(report.student).resolve().name: report}))
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
