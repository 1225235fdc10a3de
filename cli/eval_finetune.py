"""`kdeval finetune`: fine-tune a student on a task with several seeds, and measure it there.

The result goes to standard output as a table, or with --json as one JSON record; the record is also left in the
student's directory as finetune-TASK.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli.display import StatusLine, tell_loading
from cli.eval_shared import deliver, make_record, print_result
from cli.options import parse
from student_train.evaluate.finetune.settings import FinetuneSettings

if TYPE_CHECKING:
    from student_train.evaluate.finetune.records import FinetuneReport


def finetune(argv: list[str]) -> int:
    """`kdeval finetune`; returns the exit code."""
    settings = parse(FinetuneSettings, argv, "kdeval finetune")
    report = _measure(settings)
    record = make_record("finetune", report.to_json())
    printed, written = (json.dumps(record, indent=indent, allow_nan=False) for indent in (None, 2))
    path = Path(settings.student).expanduser() / f"finetune-{settings.task}.json"
    deliver(written, path, lambda: print(printed) if settings.json else _print_table(report))
    return 0


def _measure(settings: FinetuneSettings) -> FinetuneReport:
    tell_loading()
    # imported late, so that --help need not wait for torch
    from student_train.engine.memory import explain_memory_errors
    from student_train.evaluate.finetune.finetune import measure_finetune
    from teacher_cache.device import choose_device_type

    status = StatusLine()

    def show(what: str, step: int, steps: int) -> None:
        status.show_share(step, steps, f"fine-tuning {what}: step {step} of {steps}", last=step == steps)

    with explain_memory_errors("a smaller --batch-size or --max-length, or --device cpu"):
        return measure_finetune(settings, device=choose_device_type(settings.device), show=show)


def _print_table(report: FinetuneReport) -> None:
    from student_train.evaluate.finetune.records import finetune_table

    print_result([finetune_table(Path(report.student).resolve().name, report)], report.notes)
