"""Quality against cost: which plots there are, and what they are of."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from student_train.evaluate.compare import plots
from student_train.evaluate.compare.compare import compare_runs
from student_train.evaluate.compare.plots import GENERATION_PLOT, LATENCY_PLOT, PARAMETERS_PLOT, plot_comparison
from student_train.evaluate.compare.teacher_point import (
    teacher_latency,
    teacher_parameters,
)
from tests.student_train.evaluate.left_records import answered, finetuned, read_text, timed, write
from tests.student_train.evaluate.reports import make_report

BLUE, ORANGE = (0x1F, 0x5F, 0xA8), (0xD9, 0x66, 0x1F)


def drawn(path: Path) -> np.ndarray[Any, Any]:
    """The pixels; nothing of the picture is cut off at its edges."""
    pixels = imread(path)[:, :, :3]
    inked = (pixels < 0.9).any(axis=2)
    assert inked.mean() > 0.01
    for edge in (inked[:2], inked[-2:], inked[:, :2], inked[:, -2:]):
        assert not edge.any()
    return pixels * 255


def test_two_plots_with_a_colour_for_each_method(make_run: Any, tmp_path: Path) -> None:
    for name, method, milliseconds in (("a", "mha", 3.0), ("b", "hs", 30.0)):
        run = make_run(name, method=method, scores=[0.5, 0.6])
        timed(run, milliseconds)
        finetuned(run, "rte", [0.7, 0.8])
    paths = plot_comparison(compare_runs([str(tmp_path / "a"), str(tmp_path / "b")]), tmp_path)
    assert paths == [tmp_path / LATENCY_PLOT, tmp_path / PARAMETERS_PLOT]
    for path in paths:
        pixels = drawn(path)
        for color in (BLUE, ORANGE):
            assert (np.abs(pixels - color).max(axis=2) < 8).any(), color


def test_a_plot_is_replaced_whole(make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("a", scores=[0.5])
    timed(run, 3.0)
    found, out = compare_runs([str(run)]), tmp_path / "out"
    out.mkdir()
    paths = plot_comparison(found, out)
    before = {path: path.read_bytes() for path in paths}

    def full(_figure: Figure, file: Path, **_options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        plot_comparison(found, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_names_that_look_like_formulas_are_drawn(make_run: Any, tmp_path: Path) -> None:
    run = make_run("a")
    timed(run, 3.0)
    finetuned(run, "$\\frac{$", [0.7, 0.8])
    (latency, _) = plot_comparison(compare_runs([str(run)]), tmp_path)
    drawn(latency)


def test_quality_is_the_average_or_else_the_distance_to_the_teacher(make_run: Any) -> None:
    run = make_run("a")
    bare = compare_runs([str(run)])
    assert plots._quality(bare) is None
    write(run / "fidelity.json", {"evaluation": "fidelity", **make_report().to_json()})
    found = plots._quality(compare_runs([str(run)]))
    assert found is not None and found.lower_is_better and found.label.startswith("relation KL")
    assert found.values == {"a": (pytest.approx(2.0), None)}
    finetuned(run, "sst2", [0.5, 0.7])
    found = plots._quality(compare_runs([str(run)]))
    assert found is not None and (found.label, found.lower_is_better) == ("sst2, × 100", False)
    assert found.values["a"] == (pytest.approx(60), pytest.approx(20 / 2**0.5))
    finetuned(run, "rte", [0.2, 0.2])
    found = plots._quality(compare_runs([str(run)]))
    assert found is not None and found.label == "average of rte, sst2, × 100"
    assert found.values["a"][0] == pytest.approx(40)


def test_what_has_no_numbers_is_not_drawn(make_run: Any, tmp_path: Path) -> None:
    assert plot_comparison(compare_runs([str(make_run("a"))]), tmp_path) == []
    # scored, but neither timed nor of a known size
    assert plot_comparison(compare_runs([str(make_run("b", scores=[0.5]))]), tmp_path) == []
    assert not list(tmp_path.glob("*.png"))


def test_causal_students_by_bits_per_byte(make_run: Any, tmp_path: Path) -> None:
    for name, bits in (("a", 2.0), ("b", 1.5)):
        run = make_run(name, method="od" if name == "a" else "lm")
        read_text(run, bits)
        answered(run, 100 * bits)
    found = compare_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    quality = plots._quality(found)
    assert quality is not None and quality.lower_is_better and quality.label.startswith("bits per byte")
    assert {name: value for name, (value, _) in quality.values.items()} == pytest.approx({"a": 2.0, "b": 1.5})
    paths = plot_comparison(found, tmp_path)
    assert paths == [tmp_path / PARAMETERS_PLOT, tmp_path / GENERATION_PLOT]
    for path in paths:
        drawn(path)


INK = (0x1D, 0x23, 0x2B)


@pytest.mark.parametrize("known", [True, False], ids=["a point", "a line"])
def test_the_teacher_is_shown(known: bool, make_run: Any, tmp_path: Path) -> None:
    """A star where its quality is known; what it scored on a task is not, and what it costs is."""
    for name in ("a", "b"):
        run = make_run(name)
        timed(run, 3.0, fingerprints={"student": "s", "teacher": "t"})
        if known:
            write(run / "fidelity.json", {"evaluation": "fidelity", **make_report().to_json()})
        else:
            finetuned(run, "rte", [0.7, 0.8])
    found = compare_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert (teacher_latency(found), teacher_parameters(found)) == (24.0, 22.0)
    quality = plots._quality(found)
    assert quality is not None and quality.of_teacher == (0.0 if known else None)
    pixels = drawn(plot_comparison(found, tmp_path)[0])
    dark = (np.abs(pixels - INK).max(axis=2) < 8).nonzero()
    # a line goes from the top of the plot to its bottom, a star does not; axes and words are grey or black
    assert len(dark[0]) > 100 and (np.ptp(dark[0]) > 300) == (not known)
