"""What plots share: figures that draw without a display, and labels that do not lie on each other."""

from __future__ import annotations

import itertools

import matplotlib as mpl
from matplotlib.text import Annotation, Text

from student_train.evaluate.drawing import BLUE, GREY, PALETTE, as_it_is, new_figure, spread_labels, style_axes


def test_a_figure_leaves_no_state_behind() -> None:
    from matplotlib import pyplot

    before = (mpl.get_backend(auto_select=False), pyplot.get_fignums())
    figure = new_figure(4, 3)
    figure.subplots().plot([0, 1], [1, 0], color=BLUE)
    figure.draw_without_rendering()
    assert (mpl.get_backend(auto_select=False), pyplot.get_fignums()) == before
    assert tuple(figure.get_size_inches()) == (4, 3) and len(set(PALETTE)) == len(PALETTE)


def test_text_of_others_is_drawn_as_it_is() -> None:
    for text, shown in (
        ("$\\frac{$", "$\\frac{$"),
        ("a $x$ b$", "a $x$ b$"),
        ("\x1b[31m", r"\x1b[31m"),
        ("plain", "plain"),
    ):
        figure = new_figure(4, 3)
        title = figure.suptitle(as_it_is(text))
        figure.draw_without_rendering()
        assert title._preprocess_math(title.get_text()) == (shown, False)  # type: ignore[attr-defined]


def test_long_text_is_cut_where_there_is_no_room_for_it() -> None:
    assert as_it_is("x" * 61) == "x" * 60 + "…"
    assert as_it_is("x" * 151, 150) == "x" * 150 + "…" and as_it_is("x" * 150, 150) == "x" * 150


def test_axes_have_two_quiet_spines() -> None:
    axes = new_figure(4, 3).subplots()
    style_axes(axes)
    shown = {name for name, spine in axes.spines.items() if spine.get_visible()}
    assert shown == {"left", "bottom"}
    assert axes.xaxis.label.get_color() == axes.yaxis.label.get_color() == GREY


def boxes(points: list[tuple[float, float, str]]) -> tuple[list[Annotation], list[tuple[float, float]]]:
    figure = new_figure(6, 4)
    axes = figure.subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    spread_labels(axes, points)
    figure.draw_without_rendering()
    labels = [each for each in axes.texts if isinstance(each, Annotation)]
    # without the line that leads back to the point
    extents = [Text.get_window_extent(each) for each in labels]
    return labels, [(extent.y0, extent.y1) for extent in extents]


def test_labels_of_one_place_are_spread() -> None:
    labels, extents = boxes([(2.0, 5.0 + place / 50, f"student {place}") for place in range(4)])
    assert sorted(each.get_text() for each in labels) == [f"student {place}" for place in range(4)]
    middles = sorted((low + high) / 2 for low, high in extents)
    # each has a line of 11 points to itself
    assert all(upper - lower > 10.9 * 120 / 72 for lower, upper in itertools.pairwise(middles))
    # a label that had to move points back at its place
    assert sum(each.arrow_patch is not None for each in labels) == 3


def test_labels_far_from_each_other_stay_at_their_points() -> None:
    """Also one beside another: their texts end before they meet."""
    labels, _ = boxes([(1.0, 5.0, "one"), (1.0, 8.0, "two"), (8.0, 5.0, "three")])
    assert all(each.arrow_patch is None for each in labels)
    assert [each.xyann[1] for each in labels] == [0, 0, 0]


def test_names_are_no_formulas() -> None:
    labels, _ = boxes([(1.0, 5.0, "$x^$ & <b>")])
    assert labels[0].get_text() == "$x^$ & <b>" and not labels[0].get_parse_math()
