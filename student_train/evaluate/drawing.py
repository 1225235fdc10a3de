"""What the plots of evaluations share: colours, figures without a display, quiet axes, labels that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from teacher_cache.outside import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREEN, GREY, LIGHT = "#1d232b", "#1f5fa8", "#d9661f", "#2d8a5f", "#5f6670", "#e3e6ea"
PALETTE = (BLUE, ORANGE, GREEN, "#8a4fa8", "#b0303c", "#158a94", "#9a7b0f", "#6a4b3a")
_LABEL_POINTS = 11.0
_LONGEST = 60


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that draws itself without a display and leaves no state behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def as_it_is(text: str, longest: int = _LONGEST) -> str:
    """Text of anybody's, such as a name in a record, to be drawn as it is: matplotlib takes dollars for formulas.

    Only its first letters where there would be no room for anything else.
    """
    shown = visible(text)
    return (shown if len(shown) <= longest else f"{shown[:longest]}…").replace("$", r"\$")


def style_axes(axes: Axes) -> None:
    """Two quiet spines, small grey ticks, data above the grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    axes.set_axisbelow(True)


def spread_labels(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a label beside every point (x, y, label), moved up or down where another one stands already."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    size = figure.dpi / 72
    placed: list[tuple[float, float, float]] = []
    places = [(*axes.transData.transform((x, y)), x, y, label) for x, y, label in points]
    for left, middle, x, y, label in sorted(places, key=lambda place: place[1]):
        width = 6.0 * size * len(label)
        height = float(middle)
        for other_left, other_width, other in sorted(placed, key=lambda place: place[2]):
            beside = left + width < other_left or other_left + other_width < left
            if not beside and abs(height - other) < _LABEL_POINTS * size:
                height = other + _LABEL_POINTS * size
        placed.append((float(left), width, height))
        axes.annotate(
            label,
            (x, y),
            xytext=(9, (height - middle) / size),
            textcoords="offset points",
            fontsize=9,
            va="center",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": LIGHT, "shrinkA": 0, "shrinkB": 4} if height != middle else None,
        )
