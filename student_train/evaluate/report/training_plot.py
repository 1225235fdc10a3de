"""One picture of a training: its curve, and how far the student was from its teacher before and after.

In: the records of a metrics.jsonl and two `FidelityReport`s. Out: a PNG. Nothing is measured here. Drawing takes about
a second and no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_train.evaluate.drawing import BLUE, GREY, LIGHT, ORANGE, as_it_is, new_figure, style_axes
from student_train.evaluate.fidelity.records import FidelityReport, Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST_TITLE = 150
"""Letters above the whole picture."""


def plot_training(
    records: Sequence[Mapping[str, Any]], reports: Mapping[str, FidelityReport], path: Path, *, title: str
) -> None:
    """Draw the training curve beside the fidelity before and after into the PNG `path`.

    Args:
        records: of a metrics.jsonl: training records with `step` and `loss`, validation records with `valid_loss`.
        reports: two reports by name, before and after.
        path: file to write.
        title: what was trained on what, over the picture.
    """
    figure = new_figure(13, 5.4)
    curve, fidelity = figure.subplots(1, 2, width_ratios=(1, 1.15))
    figure.suptitle(as_it_is(title, _LONGEST_TITLE), fontsize=13, x=0.01, ha="left", weight="bold")
    _draw_curve(curve, records)
    _draw_fidelity(fidelity, reports)
    figure.savefig(path)


def _draw_curve(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    training = [(record["step"], record["loss"]) for record in records if "loss" in record]
    validation = [(record["step"], record["valid_loss"]) for record in records if "valid_loss" in record]
    style_axes(axes)
    if training:
        axes.plot(*zip(*training, strict=True), color=BLUE, linewidth=1.2, alpha=0.75, label="training, each step")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), color=ORANGE, linewidth=2, marker="o", markersize=5, label="held-out rows"
        )
        _annotate_ends(axes, validation)
    axes.set_title("Training loss", loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.legend(frameon=False, loc="upper right")


def _annotate_ends(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    for (step, value), offset, side in ((points[0], (10, 2), "left"), (points[-1], (0, 9), "center")):
        axes.annotate(
            f"{value:.3g}",
            (step, value),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            color=ORANGE,
            weight="bold",
        )


def _draw_fidelity(axes: Axes, reports: Mapping[str, FidelityReport]) -> None:
    """One line per error, from before to after on a logarithmic scale, so that measures of any size share the axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (before_name, before), (after_name, after) = ((name, report.lines()) for name, report in reports.items())
    keys = [key for key, measure in after.items() if key in before and not measure.higher_is_better]
    style_axes(axes)
    for place, key in enumerate(keys):
        start, end = before[key].value, after[key].value
        axes.plot((start, end), (place, place), color=LIGHT, linewidth=5, solid_capstyle="round", zorder=1)
        axes.scatter(start, place, s=70, color=GREY, zorder=2, label=as_it_is(before_name) if place == 0 else None)
        axes.scatter(end, place, s=70, color=BLUE, zorder=3, label=as_it_is(after_name) if place == 0 else None)
        _annotate_pair(axes, place, start, end)
    axes.set_yticks(range(len(keys)), [_short_label(after[key]) for key in keys])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.22, y=0.12)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.set_title("Distance to the teacher on held-out rows (layers: student → teacher)", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)


def _annotate_pair(axes: Axes, place: int, start: float, end: float) -> None:
    for value, other, color in ((start, end, GREY), (end, start, BLUE)):
        right = value > other or (value == other and color == GREY)
        axes.annotate(
            f"{value:.3g}",
            (value, place),
            xytext=(10 if right else -10, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            color=color,
            fontsize=9,
            weight="bold",
        )
    if end > 0:
        axes.annotate(
            f"{start / end:.1f}×",
            ((start * end) ** 0.5, place),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GREY,
        )


def _short_label(measure: Measure) -> str:
    return f"{measure.label}\n{measure.place}"
