"""`kdeval trim`: cut a student's vocabulary to the ids that a text uses.

The result goes to standard output as a table, or with --json as one JSON record; the record is also left in the
directory that is written, as trim.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli.display import StatusLine
from cli.eval_shared import deliver, make_record, print_result, writes_to
from cli.options import parse
from student_train.evaluate.trim.settings import TrimSettings
from student_train.run_files import TRIMMED

if TYPE_CHECKING:
    from student_train.evaluate.trim.records import TrimReport


def trim(argv: list[str]) -> int:
    """`kdeval trim`; returns the exit code."""
    settings = parse(TrimSettings, argv, "kdeval trim")
    out = settings.check_out()
    report = _trim(settings, out)
    record = make_record("trim", report.to_json())
    printed, written = (json.dumps(record, indent=indent, allow_nan=False) for indent in (None, 2))
    deliver(written, out / TRIMMED, lambda: print(printed) if settings.json else _print_table(report))
    return 0


def _trim(settings: TrimSettings, out: Path) -> TrimReport:
    # imported late, so that --help need not wait for torch
    from student_train.evaluate.trim.trim import trim_student
    from teacher_cache.corpus.documents import read_documents

    status = StatusLine()
    told: set[str] = set()

    def note(line: str) -> None:
        # the text is read again to compare
        if line not in told:
            status.note(f"note: {line}")
        told.add(line)

    trimmed = trim_student(
        settings,
        # without `chat`, all of them are plain text
        lambda: (text for text in read_documents(settings.text, note) if isinstance(text, str)),
        show=status.show,
    )
    with writes_to(settings.out):
        report = trimmed.write(out)
    status.show(f"wrote {settings.out}", last=True)
    return report


def _print_table(report: TrimReport) -> None:
    from student_train.evaluate.trim.records import trim_table

    print_result([trim_table(Path(report.student).resolve().name, report)], report.notes)
