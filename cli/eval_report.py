"""`kdeval report`: everything that is known of a run, as one HTML file that needs no network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cli.display import tell_loading
from cli.eval_shared import refuse_unwritable, writes_to
from cli.options import parse
from teacher_cache.disk import write_whole

REPORT_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Write a report of a run: training curves, fidelity, attention relations, tasks, latency, provenance.

    One HTML file that carries its pictures. A section whose record is missing names the command that makes it.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the student: what kdtrain wrote, or any model that kdeval measured."""

    cache: tuple[str, ...] = ()
    """Store that `kdcache build` wrote, or several, to show the teacher's attention relations beside the student's."""

    out: str | None = None
    """File to write (default: report.html in RUN)."""

    json: bool = False
    """Print where it is and its size as JSON."""


def report(argv: list[str]) -> int:
    """`kdeval report`; returns the exit code."""
    settings = parse(ReportSettings, argv, "kdeval report")
    tell_loading()
    # imported late, so that --help need not wait for torch
    from student_train.evaluate.report.report import make_report

    out = Path(settings.run if settings.out is None else settings.out).expanduser()
    out = out / REPORT_NAME if settings.out is None else out
    if settings.out is not None:
        refuse_unwritable(out)
    text = make_report(settings.run, settings.cache)
    with writes_to(str(out)):
        write_whole(out, text)
    size = len(text.encode())
    print(
        json.dumps({"path": str(out), "bytes": size}) if settings.json else f"written to {out} ({size / 1e3:,.0f} kB)"
    )
    return 0
