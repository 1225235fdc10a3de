"""`kdeval compare`: runs side by side, from the records that training and measurements left in their directories.

The tables go to standard output, or with --json one JSON record. With --out, tables, record and plots are written
into a folder as well.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cli.display import StatusLine, tell_loading
from cli.eval_shared import make_record, print_result, writes_to
from cli.options import parse
from teacher_cache.disk import write_whole
from teacher_cache.errors import SettingsError

if TYPE_CHECKING:
    from student_train.evaluate.compare.compare import Comparison

RECORD_NAME, TABLE_NAME = "comparison.json", "comparison.md"
_FILE_WIDTH = 240


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Compare runs: what they are, fidelity, scores on tasks with significance, latency; in tables and plots.

    Reads the records that kdtrain and the other commands of kdeval left in the directories, and measures nothing.
    Trainings that differ in their --seed alone make one row. Differences to the baseline are paired over the seeds that
    both have.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Directories of students, of their teacher, or of any model that kdeval measured."""

    baseline: str | None = None
    """The run that the others are compared with (default: the first)."""

    out: str | None = None
    """Folder to write comparison.md, comparison.json and the plots into."""

    json: bool = False
    """Print one JSON record on standard output instead of tables."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise SettingsError("no run is given, so there is nothing to compare: give one directory or more")


def compare(argv: list[str]) -> int:
    """`kdeval compare`; returns the exit code."""
    settings = parse(CompareSettings, argv, "kdeval compare")
    tell_loading()
    # imported late, so that --help need not wait for torch
    from student_train.evaluate.compare.compare import compare_runs

    comparison = compare_runs(settings.runs, baseline=settings.baseline)
    record = make_record("compare", comparison.to_json())
    if settings.out is not None:
        with writes_to(settings.out):
            _write(comparison, record, Path(settings.out).expanduser())
    if settings.json:
        print(json.dumps(record, allow_nan=False))
    else:
        _print_tables(comparison)
    return 0


def _write(comparison: Comparison, record: dict[str, Any], folder: Path) -> None:
    from student_train.evaluate.compare.plots import plot_comparison
    from student_train.evaluate.compare.table import markdown

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD_NAME, json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_whole(folder / TABLE_NAME, markdown(comparison))
    plots = plot_comparison(comparison, folder)
    names = [RECORD_NAME, TABLE_NAME, *(plot.name for plot in plots)]
    StatusLine().note(f"written to {folder}: {', '.join(names)}")


def _print_tables(comparison: Comparison) -> None:
    from student_train.evaluate.compare.table import comparison_grids, rich_table

    # a file has no width that a table should be squeezed into
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    print_result(map(rich_table, comparison_grids(comparison)), comparison.notes, width=width)
