"""`kdeval export`: a student as a folder that can be published and served.

The result goes to standard output as tables, or with --json as one JSON record. What was measured of ONNX files is also
left in the student's directory as onnx.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cli.display import StatusLine
from cli.eval_shared import deliver, make_record, print_result
from cli.options import parse
from student_train.evaluate.export.settings import ExportSettings
from teacher_cache.outside import visible
from teacher_cache.wording import format_bytes

if TYPE_CHECKING:
    from student_train.evaluate.export.export import ExportReport

RECORD_NAME = "onnx.json"


@dataclass(frozen=True, kw_only=True)
class ExportFlags(ExportSettings):
    """Make a folder of a student that can be published and served: weights, tokenizer, configuration, model card.

    Nothing else is in it, and no path of this machine. The tokenizer reads as much as the student can, and not only as
    much as a row of its training had. The card says what the records of kdtrain and kdeval in the student's directory
    say, and by which commands it was made. With --onnx and --int8 the folder has files for ONNX Runtime too, measured
    beside PyTorch: error, fidelity, speed, size.
    """

    student: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDENT")]
    """Directory of the student: what kdtrain or kdeval finetune wrote, or any Hugging Face model."""


def export(argv: list[str]) -> int:
    """`kdeval export`; returns the exit code."""
    settings = parse(ExportFlags, argv, "kdeval export")
    report = _export(settings)
    printed = json.dumps(make_record("export", report.to_json()), allow_nan=False)

    def show() -> None:
        print(printed) if settings.json else _print_tables(report)

    if report.onnx is None:
        show()
        return 0
    record = json.dumps(make_record("onnx", report.onnx.to_json()), indent=2, allow_nan=False)
    deliver(record, Path(settings.student).expanduser() / RECORD_NAME, show)
    return 0


def _export(settings: ExportSettings) -> ExportReport:
    # imported late, so that --help need not wait for torch
    from student_train.evaluate.export.export import export_student_folder

    status = StatusLine()
    report = export_student_folder(settings, show=status.show)
    status.show(f"exported to {report.out}", last=True)
    return report


def _print_tables(report: ExportReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    from student_train.evaluate.onnx.records import onnx_table

    files = Table(title=escape(visible(f"{report.out}: {report.pipeline}")), title_justify="left")
    files.add_column("file")
    files.add_column("size", justify="right")
    for name, size in report.files.items():
        files.add_row(escape(visible(name)), format_bytes(size))
    files.add_row("all", format_bytes(report.bytes), style="bold")
    onnx = [] if report.onnx is None else [onnx_table(Path(report.student).resolve().name, report.onnx)]
    notes = list(report.notes)
    if report.similarity is not None:
        found = report.similarity
        cosine = "" if found.cosine is None else f"cosine with the teacher's embedding {found.cosine:.3f}; "
        notes.append(f"{found.sentences} sentences: {cosine}correlation of all pairs' cosines {found.correlation:.3f}")
    if report.address is not None:
        notes.append(f"uploaded to {report.address}")
    print_result([files, *onnx], [*notes, *(() if report.onnx is None else report.onnx.notes)])
