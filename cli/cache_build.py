"""`kdcache build`: run the teacher once over a corpus and write what students learn from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cli.display import BuildDisplay
from cli.entry import Stopping, follows, stops_on_sigterm
from cli.options import parse
from teacher_cache.build.settings import BuildSettings
from teacher_cache.wording import format_bytes

if TYPE_CHECKING:
    from teacher_cache.build.inputs import BuildProgress


@dataclass(frozen=True, kw_only=True)
class BuildFlags(BuildSettings):
    """Run the teacher once over a corpus and write what students learn from."""

    json: bool = False
    """Print the result as JSON."""


def build(argv: list[str]) -> int:
    """`kdcache build`; returns the exit code."""
    settings = parse(BuildFlags, argv, "kdcache build")
    if settings.tensor_parallel and follows():
        return _follow(settings)
    with stops_on_sigterm("kdcache build") as stopping:
        progress = BuildDisplay()
        from transformers.utils import logging

        from teacher_cache.build.build import build_cache
        from teacher_cache.build.inputs import Silent
        from teacher_cache.build.workers import Workers

        logging.disable_progress_bar()
        workers = Workers.from_environment()
        report = build_cache(settings, _Stoppable(progress if workers.first else Silent(), stopping), workers)
    if not workers.first:
        return 0
    if settings.json:
        print(json.dumps(asdict(report)))
        return 0
    rate = report.computed_rows / report.seconds if report.seconds else 0.0
    print(
        f"{report.path}: {report.rows} rows, complete. Computed {report.computed_rows} rows in {report.seconds:.1f} s "
        f"({rate:.1f} rows/s), wrote {format_bytes(report.written_bytes)}"
    )
    return 0


def _follow(settings: BuildSettings) -> int:
    """Hold a share of the teacher. Nothing is written here, so that signals may end it wherever it waits."""
    from transformers.utils import logging

    from teacher_cache.build.build import build_cache
    from teacher_cache.build.workers import Workers

    logging.disable_progress_bar()
    build_cache(settings, workers=Workers.from_environment())
    return 0


class _Stoppable:
    """Progress of a build, which starts when the teacher is loaded; a signal ends the build there at the latest."""

    def __init__(self, shown: BuildProgress, stopping: Stopping) -> None:
        self._shown, self._stopping = shown, stopping

    def note(self, text: str) -> None:
        self._stopping.go_on()
        self._shown.note(text)

    def tokenised(self, documents: int, tokens: int) -> None:
        self._stopping.go_on()
        self._shown.tokenised(documents, tokens)

    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        self._stopping.go_on()
        self._shown.committed(rows, total, written_bytes)
