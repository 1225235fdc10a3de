"""`kdeval perplexity`: how well a causal student predicts text, a token and a byte.

The result goes to standard output as a table, or with --json as one JSON record; the record is also left in the
student's directory as perplexity.json. Progress goes to standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli.display import StatusLine, tell_loading
from cli.eval_shared import deliver, make_record, print_result
from cli.options import parse
from student_train.evaluate.perplexity.settings import PerplexitySettings

if TYPE_CHECKING:
    from student_train.evaluate.perplexity.records import PerplexityReport

RECORD_NAME = "perplexity.json"


def perplexity(argv: list[str]) -> int:
    """`kdeval perplexity`; returns the exit code."""
    settings = parse(PerplexitySettings, argv, "kdeval perplexity")
    report = _measure(settings)
    record = make_record("perplexity", report.to_json())
    printed, written = (json.dumps(record, indent=indent, allow_nan=False) for indent in (None, 2))
    path = Path(settings.student).expanduser() / RECORD_NAME
    deliver(written, path, lambda: print(printed) if settings.json else _print_table(report))
    return 0


def _measure(settings: PerplexitySettings) -> PerplexityReport:
    tell_loading()
    # imported late, so that --help need not wait for torch
    from student_train.engine.memory import explain_memory_errors
    from student_train.evaluate.perplexity.perplexity import measure_perplexity
    from teacher_cache.corpus.documents import read_documents
    from teacher_cache.device import choose_device_type

    status = StatusLine()
    told: set[str] = set()

    def note(line: str) -> None:
        # the text is read again for a teacher
        if line not in told:
            status.note(f"note: {line}")
        told.add(line)

    with explain_memory_errors("a smaller --batch-size or --seq-len, or --device cpu"):
        report = measure_perplexity(
            settings,
            # without `chat`, all of them are plain text
            lambda: (text for text in read_documents(settings.text, note) if isinstance(text, str)),
            device=choose_device_type(settings.device),
            show=status.show,
        )
    status.show(f"read {report.student_score.tokens:,} tokens of {report.documents:,} documents", last=True)
    return report


def _print_table(report: PerplexityReport) -> None:
    from student_train.evaluate.perplexity.records import perplexity_table

    print_result([perplexity_table(Path(report.student).resolve().name, report)], report.notes)
