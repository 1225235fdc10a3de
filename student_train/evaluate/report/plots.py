"""The pictures of a run's report, as data URIs that an HTML page can carry: SVG, a few dozen kilobytes each.

In: records of a metrics.jsonl, a `FidelityReport`, `RelationMaps`. Long trainings are averaged into some hundred
points, so that a report stays small however long the run was. Drawing takes no display.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from student_train.evaluate.drawing import BLUE, GREEN, GREY, LIGHT, ORANGE, PALETTE, as_it_is, new_figure, style_axes
from student_train.evaluate.fidelity.records import FidelityReport
from teacher_cache.contract.streams import VECTORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from student_train.evaluate.fidelity.heat_maps import RelationMaps

_POINTS = 400
_WIDE = 30
_NO_PARTS = frozenset("step loss lr tokens rows grad_norm seconds wait memory skipped_rows scaled_away".split())
"""Entries of a training record that are no part of the loss."""


def plot_training_curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Loss with its parts and the validations; below it the learning rate, tokens per second and the share of waiting.

    Args:
        records: of a metrics.jsonl, at least one of them of training.
    """
    training = [record for record in records if "loss" in record]
    bins = _bins(training)
    figure = new_figure(10, 6.2)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.7, 1))
    _draw_losses(figure.add_subplot(grid[0, :]), bins, [record for record in records if "valid_loss" in record])
    small = [figure.add_subplot(grid[1, column]) for column in range(3)]
    steps = [_mean(each, "step") for each in bins]
    _draw_small(small[0], "learning rate", steps, [_mean(each, "lr") for each in bins], BLUE)
    _draw_small(small[1], "tokens per second", *_rates(training), GREEN)
    waiting = [100 * _sum(each, "wait") / max(_sum(each, "seconds"), 1e-9) for each in bins]
    _draw_small(small[2], "% of the time waiting for the cache", steps, waiting, ORANGE)
    small[2].set_ylim(top=max(1.0, 1.05 * max(waiting)))
    small[1].yaxis.set_major_formatter("{x:,.0f}")
    return _svg(figure)


def plot_fidelity_layers(report: FidelityReport) -> str:
    """Bars per pair of layers: errors of hidden states, and KL of the three relations."""
    panels = [name for name, pairs in (("hidden", report.hidden), ("relations", report.relations)) if pairs]
    figure = new_figure(10, 3.4)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        style_axes(axes)
        axes.grid(axis="x", color=LIGHT, linewidth=0.6)
        if panel == "hidden":
            names = [f"{pair.student_layer} → {pair.teacher_layer}" for pair in report.hidden]
            bars = axes.barh(names, [pair.nmse for pair in report.hidden], color=BLUE, height=0.62)
            axes.set_title("Hidden NMSE (1: no better than the mean)", loc="left", fontsize=10)
        else:
            names = [
                f"{name}, {pair.student_layer} → {pair.teacher_layer}" for pair in report.relations for name in VECTORS
            ]
            values = [getattr(pair, name) for pair in report.relations for name in VECTORS]
            bars = axes.barh(names, values, color=ORANGE, height=0.62)
            axes.set_title("Relation KL, nats", loc="left", fontsize=10)
        axes.bar_label(bars, fmt="%.3f", padding=4, fontsize=8.5, color=GREY)
        axes.margins(x=0.14)
        axes.invert_yaxis()
    return _svg(figure)


def plot_relation_maps(maps: RelationMaps) -> str:
    """Two rows (teacher, student) of three maps (queries, keys, values); a column shares its colours."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    count = len(maps.tokens)
    figure = new_figure(11, 8.2)
    all_axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for column, name in enumerate(VECTORS):
        both = (maps.teacher[name], maps.student[name])
        # a root brings out what the diagonal would outshine
        norm = PowerNorm(0.5, vmin=0, vmax=max(float(each.max()) for each in both))
        titles = (f"teacher, {name}", f"student, {name}: KL {maps.kl[name]:.3f}")
        for axes, values, title in zip(all_axes[:, column], both, titles, strict=True):
            image = axes.imshow(values, cmap="magma", norm=norm, interpolation="none")
            axes.set_title(title, loc="left", fontsize=10)
            axes.tick_params(length=0, labelsize=8, labelcolor=GREY)
            axes.spines[:].set_visible(False)
            axes.set_xticks(range(count), maps.tokens, rotation=90, parse_math=False)
            axes.set_yticks(range(count), maps.tokens, parse_math=False)
        bar = figure.colorbar(
            image, ax=all_axes[:, column], location="bottom", shrink=0.8, aspect=30, pad=0.02, ticks=MaxNLocator(4)
        )
        bar.ax.tick_params(labelsize=7, labelcolor=GREY)
        bar.outline.set_visible(False)
    return _svg(figure, text="none")


def thin_out(records: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """About so many of the records at even distances, the last one among them."""
    return records[:: -max(1, len(records) // most)][::-1]


def _svg(figure: Figure, text: str = "path") -> str:
    """The figure as a data URI, the same bytes every time. With text="none" the reader's own fonts show its words."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": text, "svg.hashsalt": "report"}), warnings.catch_warnings():
        # laid out without a glyph for it, a token of another script is still shown by the reader's fonts
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _bins(records: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    size = -(-len(records) // _POINTS)
    return [records[start : start + size] for start in range(0, len(records), size)]


def _sum(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(float(record.get(name) or 0) for record in records)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return _sum(records, name) / len(records)


def _rates(training: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Steps, and real tokens per second since the records before: `tokens` counts from the beginning."""
    steps, rates, before = [], [], 0.0
    for part in _bins(training):
        after = float(part[-1]["tokens"])
        steps.append(_mean(part, "step"))
        rates.append((after - before) / max(_sum(part, "seconds"), 1e-9))
        before = after
    return steps, rates


def _draw_losses(
    axes: Axes, bins: Sequence[Sequence[Mapping[str, Any]]], validations: Sequence[Mapping[str, Any]]
) -> None:
    steps = [_mean(each, "step") for each in bins]
    losses = [_mean(each, "loss") for each in bins]
    parts = [name for name in bins[0][0] if name not in _NO_PARTS]
    style_axes(axes)
    axes.plot(steps, losses, color=BLUE, linewidth=1.6, label="training", zorder=3)
    lowest, highest = min(losses), max(losses)
    for place, name in enumerate(parts if len(parts) > 1 else []):
        values = [_mean(each, name) for each in bins]
        lowest, highest = min(lowest, *values), max(highest, *values)
        color, label = PALETTE[2 + place % (len(PALETTE) - 2)], f"{as_it_is(name)}, unweighted"
        axes.plot(steps, values, color=color, linewidth=1, label=label)
    if validations:
        shown = thin_out(validations, _POINTS // 4)
        points = [(record["step"], record["valid_loss"]) for record in shown]
        axes.plot(
            *zip(*points, strict=True), color=ORANGE, linewidth=1.6, marker="o", markersize=4.5, label="held-out rows",
            zorder=4,
        )  # fmt: skip
        axes.annotate(
            f"{points[-1][1]:.4g}", points[-1], xytext=(0, 8), textcoords="offset points", ha="center", color=ORANGE,
            fontsize=9, weight="bold",
        )  # fmt: skip
    if lowest > 0 and highest / lowest > _WIDE:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, lowest))
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_title("Loss", loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.legend(frameon=False, fontsize=9, ncols=3)


def _draw_small(axes: Axes, title: str, steps: Sequence[float], values: Sequence[float], color: str) -> None:
    style_axes(axes)
    axes.plot(steps, values, color=color, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
