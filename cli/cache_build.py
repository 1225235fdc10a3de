"""`kdcache build`: run the teacher once over a corpus and write what students learn from."""

from __future__ import annotations

from cli.display import BuildDisplay
from cli.entry import stops_on_sigterm
from cli.options import parse
from teacher_cache.build.settings import BuildSettings
from teacher_cache.wording import format_bytes


def build(argv: list[str]) -> int:
    """`kdcache build`; returns the exit code."""
    settings = parse(BuildSettings, argv, "kdcache build")
    with stops_on_sigterm("kdcache build"):
        progress = BuildDisplay()
        from transformers.utils import logging

        from teacher_cache.build.build import build_cache
        from teacher_cache.build.workers import Workers

        logging.disable_progress_bar()
        workers = Workers.from_environment()
        report = build_cache(settings, progress if workers.first else None, workers)
    if not workers.first:
        return 0
    rate = report.computed_rows / report.seconds if report.seconds else 0.0
    print(
        f"{report.path}: {report.rows} rows, complete. Computed {report.computed_rows} rows in {report.seconds:.1f} s "
        f"({rate:.1f} rows/s), wrote {format_bytes(report.written_bytes)}"
    )
    return 0
