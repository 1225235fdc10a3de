"""One picture of `codec.py`'s figures: bits against NMSE with the Gaussian bound, and bits against relation KL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from quality import Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#1f5fa8", "#d9661f", "#2e8b57", "#7d4fa1", "#b03050", "#5f6670")
_GREY, _LIGHT = "#5f6670", "#d7dbe0"
_NARROW = 2.0
_MARKERS = {"hidden": "o", "attention": "D"}


def plot(path: Path, measured: list[dict[str, Any]], layers: dict[int, Layer]) -> None:
    """Draw into a PNG: one colour for each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(11, 4.8), dpi=100, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    error, relation = figure.subplots(1, 2)
    for colour, (number, layer) in zip(_COLOURS, layers.items(), strict=False):
        own = [one for one in measured if one["layer"] == number]
        hidden = [one for one in own if one["target"] == "hidden"]
        nmse = [10 ** (exponent / 10) for exponent in range(-80, -5)]
        error.plot([layer.bound("hidden", x) for x in nmse], nmse, color=colour, linewidth=1.2)
        error.scatter(
            *points(hidden, "entropy", "NMSE"), s=50, facecolors="none", edgecolors=colour, linewidths=1, zorder=2
        )
        error.scatter(*points(hidden, "bits", "NMSE"), s=28, color=colour, zorder=3, label=f"layer {number}")
        for target, marker in _MARKERS.items():
            some = [one for one in own if one["target"] == target and one["relation_kl"] is not None]
            name = f"layer {number}" if target == "hidden" else f"layer {number}, in the metric of attention"
            relation.scatter(
                *points(some, "bits", "relation_kl"), s=28, color=colour, marker=marker, zorder=3, label=name
            )
    first = next(iter(layers))
    for axes, name in ((error, "NMSE"), (relation, "relation_kl")):
        label([one for one in measured if one["layer"] == first and one["target"] == "hidden"], axes, name)
        style(axes)
    error.set_title("NMSE: ● on disk, ○ order-0 entropy, line: Gaussian bound", loc="left", fontsize=10)
    relation.set_title("KL of the relations of q, k, v to the exact ones, nats", loc="left", fontsize=10)
    canvas.draw()
    # few colours: a third of the bytes
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64).save(path, optimize=True)


def points(measured: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    return [one[x] for one in measured], [one[y] for one in measured]


def label(measured: list[dict[str, Any]], axes: Axes, name: str) -> None:
    for one in measured:
        if one[name] is None:
            continue
        # calibrated ones are leftmost, but for the last there is no room on their left
        left = one["precision"].startswith("nmse:") and one["bits"] > _NARROW
        axes.annotate(
            one["precision"],
            (one["bits"], one[name]),
            xytext=(-14, -12) if left else (9, 1),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
            color=_GREY,
        )


def style(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_xlim(0, 17.5)
    axes.set_xlabel("bits per value")
    axes.grid(color=_LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
