"""`kdeval lm-eval`: a causal student on tasks of lm-evaluation-harness.

The result goes to standard output as a table, or with --json as one JSON record; the record is also left in the
student's directory as lm-eval.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli.display import StatusLine, tell_loading
from cli.eval_shared import deliver, make_record, print_result
from cli.options import parse
from student_train.evaluate.lm_eval.settings import LmEvalSettings

if TYPE_CHECKING:
    from student_train.evaluate.lm_eval.records import LmEvalReport

RECORD_NAME = "lm-eval.json"


def lm_eval(argv: list[str]) -> int:
    """`kdeval lm-eval`; returns the exit code."""
    settings = parse(LmEvalSettings, argv, "kdeval lm-eval")
    report = _measure(settings)
    record = make_record("lm-eval", report.to_json())
    printed, written = (json.dumps(record, indent=indent, allow_nan=False) for indent in (None, 2))
    path = Path(settings.student).expanduser() / RECORD_NAME
    deliver(written, path, lambda: print(printed) if settings.json else _print_table(report))
    return 0


def _measure(settings: LmEvalSettings) -> LmEvalReport:
    tell_loading()
    # imported late, so that --help need not wait for torch
    from student_train.engine.memory import explain_memory_errors
    from student_train.evaluate.lm_eval.harness import measure_lm_eval
    from teacher_cache.device import choose_device_type

    status = StatusLine()
    with explain_memory_errors("a smaller --batch-size, or --device cpu"):
        report = measure_lm_eval(settings, device=choose_device_type(settings.device), show=status.show)
    status.show(f"measured {', '.join(settings.chosen_tasks())}", last=True)
    return report


def _print_table(report: LmEvalReport) -> None:
    from student_train.evaluate.lm_eval.records import lm_eval_table

    print_result([lm_eval_table(Path(report.student).resolve().name, report)], report.notes)
