"""Table and pictures of `storage_speed.py`: bytes a token against fidelity, score and speed, with Pareto fronts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from trials import LABELS, log_bytes

from student_train.evaluate.drawing import GREY, LIGHT, PALETTE, new_figure, spread_labels, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]
SPEEDS = {"build": "build_tokens_per_second", "read": "read_tokens_per_second", "train": "train_tokens_per_second"}
BYTES = "total_bytes_per_token"


def tabulate(results: Sequence[Result], *, title: str) -> Table:
    table = Table(title=title)
    scored = any("finetune" in one for one in results)
    columns = ["bytes/token", "of which", *(f"{name} tok/s" for name in SPEEDS), "fidelity"]
    table.add_column("")
    for name in [*columns, *(["score"] if scored else [])]:
        table.add_column(name, justify="right")
    for method, measure in LABELS.items():
        own = [one for one in results if one["method"] == method]
        if own:
            table.add_section()
            table.add_row(f"{method}: {measure}", style="bold")
        for one in own:
            table.add_row(*cells(one, method), *([score(one)] if scored else []))
    return table


def cells(one: Result, method: str) -> list[str]:
    parts = ", ".join(f"{target} {size:,.1f}" for target, size in sorted(one["bytes_per_token"].items()))
    speeds = [f"{one[key]:,.0f}" if key in one else "" for key in SPEEDS.values()]
    return [one["title"], f"{one[BYTES]:,.1f}", parts, *speeds, f"{one['fidelity'][method]:.4f}"]


def score(one: Result) -> str:
    found = one.get("finetune")
    if found is None:
        return ""
    return f"{found['mean']:.4f}" + (f" ± {found['sd']:.4f}" if found["sd"] is not None else "")


def plot_fidelity(results: Sequence[Result], path: Path) -> None:
    """One panel a method; below them, where students were fine-tuned, their scores."""
    panels = {"fidelity": (lambda one: one["fidelity"][one["method"]], False)}
    if all("finetune" in one for one in results):
        task, metric = (results[0]["finetune"][name] for name in ("task", "metric"))
        panels[f"{task}, {metric}"] = (lambda one: one["finetune"]["mean"], True)
    plot(results, panels, path)


def plot_speed(results: Sequence[Result], path: Path) -> None:
    """One column a method, reading above training."""
    panels = {f"{name}, tokens a second": (itemgetter(SPEEDS[name]), True) for name in ("read", "train")}
    plot(results, panels, path)


def plot(results: Sequence[Result], panels: Mapping[str, tuple[Callable[[Result], float], bool]], path: Path) -> None:
    """One row for each of `panels`, which say what to draw and whether more of it is better."""
    methods = [method for method in LABELS if any(one["method"] == method for one in results)]
    figure = new_figure(5.2 * len(methods), 4.4 * len(panels))
    grid = figure.subplots(len(panels), len(methods), squeeze=False)
    for row, (name, (value_of, higher_is_better)) in zip(grid, panels.items(), strict=True):
        for axes, method in zip(row, methods, strict=True):
            # nothing is read where nothing is cached
            own = [one for one in results if one["method"] == method and (one[BYTES] or not name.startswith("read"))]
            draw(axes, own, [value_of(one) for one in own], higher_is_better=higher_is_better)
            what = LABELS[method] if name == "fidelity" else name
            better = "higher" if higher_is_better else "lower"
            axes.set_title(f"{method}: {what} ({better} is better)", loc="left", fontsize=10)
    figure.savefig(path)


def draw(axes: Axes, results: Sequence[Result], values: Sequence[float], *, higher_is_better: bool) -> None:
    """Points, the front of those that no other beats in both, and a line for what takes no bytes."""
    cached = [(one, value) for one, value in zip(results, values, strict=True) if one[BYTES]]
    for colour, kind in zip(PALETTE, dict.fromkeys(one["kind"] for one, _ in cached), strict=False):
        own = [(one[BYTES], value) for one, value in cached if one["kind"] == kind]
        axes.scatter(*zip(*own, strict=True), s=30, color=colour, label=kind, zorder=3)
    points = front([(one[BYTES], value) for one, value in cached], higher_is_better=higher_is_better)
    axes.step(*zip(*points, strict=True), where="post", color=LIGHT, linewidth=1.5, zorder=1)
    for one, value in zip(results, values, strict=True):
        if not one[BYTES]:
            axes.axhline(value, color=GREY, linewidth=1, linestyle="--", label="teacher in the loop", zorder=2)
    style_axes(axes)
    log_bytes(axes, "bytes a token")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(frameon=False, fontsize=8)
    spread_labels(axes, [(one[BYTES], value, one["label"]) for one, value in cached])


def front(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[tuple[float, float]]:
    """The points that no other with as few bytes is better than, by bytes."""
    best: list[tuple[float, float]] = []
    sign = -1 if higher_is_better else 1
    for size, value in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * value < sign * best[-1][1]:
            best.append((size, value))
    return best
