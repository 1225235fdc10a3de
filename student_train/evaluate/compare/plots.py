"""Quality against what it costs: one point per row of a comparison, against latency, parameters, speed of generation.

In: a `Comparison`. Out: PNG files. Quality is the average score over the tasks of the comparison; where nothing was
scored, bits per byte of text, the relation KL to the teacher, or else the hidden NMSE, upside down. Error bars are the
standard deviations of the table. The teacher is a star where its quality is known, too, and else a dashed line at what
it costs. Drawing takes about a second and no display.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from student_train.evaluate.compare.compare import ComparedRow, Comparison
from student_train.evaluate.compare.teacher_point import (
    teacher_bits,
    teacher_latency,
    teacher_parameters,
    teacher_rate,
)
from student_train.evaluate.drawing import GREY, INK, LIGHT, PALETTE, as_it_is, new_figure, spread_labels, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LATENCY_PLOT, PARAMETERS_PLOT = "quality-latency.png", "quality-parameters.png"
GENERATION_PLOT = "quality-generation.png"


@dataclass(frozen=True, kw_only=True)
class _Quality:
    label: str
    values: Mapping[str, tuple[float, float | None]]
    lower_is_better: bool
    of_teacher: float | None = None
    """Its own, where it is known: a distance to itself is 0."""


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the plots that the comparison has numbers for into `folder`; returns their paths."""
    quality = _quality(comparison)
    if quality is None:
        return []
    of_teacher = {
        LATENCY_PLOT: teacher_latency(comparison),
        PARAMETERS_PLOT: teacher_parameters(comparison),
        GENERATION_PLOT: teacher_rate(comparison),
    }
    costs: dict[str, tuple[str, dict[str, float]]] = {
        LATENCY_PLOT: (
            f"milliseconds, median of {comparison.setup}",
            {row.name: row.latency_ms for row in comparison.rows if row.latency_ms is not None},
        ),
        PARAMETERS_PLOT: (
            "million parameters",
            {row.name: row.row.parameters / 1e6 for row in comparison.rows if row.row.parameters is not None},
        ),
        GENERATION_PLOT: (
            f"tokens a second, {comparison.generation}",
            {
                row.name: row.causal.tokens_per_second
                for row in comparison.rows
                if row.causal.tokens_per_second is not None
            },
        ),
    }
    written = []
    lent = {row.name: f"{row.name} ‡" for row in comparison.rows if row.timed_as is not None}
    if lent:
        costs[LATENCY_PLOT] = (f"{costs[LATENCY_PLOT][0]}\n(‡: of another row of this shape)", costs[LATENCY_PLOT][1])
    for name, (label, values) in costs.items():
        rows = [row for row in comparison.rows if row.name in values and row.name in quality.values]
        if rows:
            names = lent if name == LATENCY_PLOT else {}
            _plot(rows, quality, label, values, names, folder / name, teacher=of_teacher[name])
            written.append(folder / name)
    return written


def _quality(comparison: Comparison) -> _Quality | None:
    rows = comparison.rows
    # in the order of columns, the average stands last
    for task in reversed(comparison.columns):
        scored = {row.name: row.scores[task] for row in rows if task in row.scores}
        if scored:
            label = f"average of {', '.join(comparison.tasks)}" if task not in comparison.tasks else task
            values = {
                name: (100 * each.mean, None if each.sd is None else 100 * each.sd) for name, each in scored.items()
            }
            return _Quality(label=f"{label}, × 100", values=values, lower_is_better=False)
    read = {row.name: row.causal.bits_per_byte for row in rows if row.causal.bits_per_byte is not None}
    if read:
        points = {name: (bits, None) for name, bits in read.items()}
        return _Quality(
            label="bits per byte of text (lower is better)",
            values=points,
            lower_is_better=True,
            of_teacher=teacher_bits(comparison),
        )
    for label, name in (("relation KL to the teacher, nats", "relation_kl"), ("hidden NMSE", "hidden_nmse")):
        found = {row.name: (getattr(row, name), None) for row in rows if getattr(row, name) is not None}
        if found:
            return _Quality(label=f"{label} (lower is better)", values=found, lower_is_better=True, of_teacher=0.0)
    return None


def _plot(
    rows: Sequence[ComparedRow],
    quality: _Quality,
    label: str,
    costs: Mapping[str, float],
    names: Mapping[str, str],
    path: Path,
    *,
    teacher: float | None,
) -> None:
    """One point a row; `names` are those that differ from the row's, `teacher` is what that costs."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(8.6, 5.2)
    axes: Axes = figure.subplots()
    style_axes(axes)
    methods = list(dict.fromkeys(row.row.method or "not trained by kdtrain" for row in rows))
    colors = {
        name: GREY if name.startswith("not ") else PALETTE[place % len(PALETTE)] for place, name in enumerate(methods)
    }
    seen = set()
    for row in rows:
        method = row.row.method or "not trained by kdtrain"
        value, deviation = quality.values[row.name]
        axes.errorbar(
            costs[row.name], value, yerr=deviation, color=colors[method], fmt="o", markersize=8, capsize=3,
            elinewidth=1.2, label=None if method in seen else as_it_is(method), markeredgecolor="white",
        )  # fmt: skip
        seen.add(method)
    marked = [(costs[row.name], quality.values[row.name][0], names.get(row.name, row.name)) for row in rows]
    if teacher is not None and quality.of_teacher is not None:
        axes.plot(teacher, quality.of_teacher, marker="*", markersize=15, color=INK, linestyle="", label="teacher")
        marked.append((teacher, quality.of_teacher, "teacher"))
    elif teacher is not None:
        axes.axvline(teacher, color=INK, linestyle="--", linewidth=1.8, label="teacher (not measured here)")
    axes.set_xlabel(label)
    axes.set_ylabel(as_it_is(quality.label))
    axes.margins(x=0.12, y=0.14)
    shown = [*(costs[row.name] for row in rows), *([] if teacher is None else [teacher])]
    if min(shown) * 4 < max(shown):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    if quality.lower_is_better:
        axes.invert_yaxis()
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    spread_labels(axes, marked)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Whole or not at all: what was there stays until the new picture is complete."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
