"""`kdcache build`: run the teacher once over a corpus and write what students learn from."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

from cli.display import BuildDisplay, format_bytes
from cli.options import parse
from teacher_cache.settings import BuildSettings

TERMINATED = 143


def build(argv: list[str]) -> int:
    """`kdcache build`; returns the exit code."""
    settings = parse(BuildSettings, argv, "kdcache build")
    before = signal.signal(signal.SIGTERM, _stop)
    progress = BuildDisplay()
    from transformers.utils import logging

    from teacher_cache.build import build_cache
    from teacher_cache.workers import Workers

    logging.disable_progress_bar()
    try:
        workers = Workers.from_environment()
        report = build_cache(settings, progress if workers.first else None, workers)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not workers.first:
        return 0
    rate = report.computed_rows / report.seconds if report.seconds else 0.0
    print(
        f"{report.path}: {report.rows} rows, complete. Computed {report.computed_rows} rows in {report.seconds:.1f} s "
        f"({rate:.1f} rows/s), wrote {format_bytes(report.written_bytes)}"
    )
    return 0


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM: leave the build loop; blocks in the writer's hands are finished, all others start anew next time."""
    print("kdcache build: stopped; committed blocks are safe, run the same command to continue", file=sys.stderr)
    raise SystemExit(TERMINATED)
