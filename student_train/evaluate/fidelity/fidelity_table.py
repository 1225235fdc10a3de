"""Fidelity reports as a table for a terminal. In: `FidelityReport`s by name, first the one to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from student_train.evaluate.fidelity.records import FidelityReport, Measure

if TYPE_CHECKING:
    from rich.table import Table


def fidelity_table(reports: Mapping[str, FidelityReport]) -> Table:
    """One line per measure and one column per report; with two, how much better the second is than the first."""
    from rich.table import Table

    columns = {name: report.lines() for name, report in reports.items()}
    table = Table(
        title="Fidelity to the teacher",
        caption=_caption(next(iter(reports.values()))),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("measure")
    table.add_column("where", style="dim")
    for name in columns:
        table.add_column(name, justify="right")
    if len(columns) == 2:
        table.add_column("better by", justify="right")
    for key, measure in _union(columns).items():
        values = [column.get(key) for column in columns.values()]
        cells = [format_value(value) for value in values]
        if len(values) == 2:
            cells.append(_gain(*values))
        table.add_row(measure.label, measure.place, *cells)
    return table


def _union(columns: Mapping[str, Mapping[str, Measure]]) -> dict[str, Measure]:
    return {key: measure for column in columns.values() for key, measure in column.items()}


def _caption(report: FidelityReport) -> str:
    kind = "held-out rows" if report.held_out else "rows"
    whole = report.last_row - report.first_row + 1
    rows = whole if report.rows is None else report.rows
    where = f"{kind} {report.first_row:,} to {report.last_row:,}" if rows == whole else f"{rows:,} {kind}"
    place = f"{where} of {report.cache}, {report.tokens:,} tokens"
    exception = ", top-1 agreement aside" if report.distribution else ""
    return f"{place}; layers: student → teacher; lower is better{exception}"


def format_value(measure: Measure | None) -> str:
    """Four significant digits, shares as percentages, an en dash for what was not measured."""
    if measure is None:
        return "–"
    return f"{measure.value:.1%}" if measure.higher_is_better else f"{measure.value:.4g}"


def _gain(before: Measure | None, after: Measure | None) -> str:
    """`3.2×` for errors, `+12.0 points` for shares."""
    if before is None or after is None:
        return "–"
    if after.higher_is_better:
        return f"{100 * (after.value - before.value):+.1f} points"
    return f"{before.value / after.value:.2f}×" if after.value > 0 else "–"
