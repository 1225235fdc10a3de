"""Tables and pictures of fidelity reports: what a reader is told, and that the picture shows it."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from student_train.evaluate.fidelity.records import (
    DistributionFidelity,
    FidelityReport,
    HiddenFidelity,
    RelationFidelity,
    fidelity_table,
)
from student_train.evaluate.report.training_plot import plot_training


def make_report(scale: float = 1.0) -> FidelityReport:
    relation = RelationFidelity(
        student_layer=3, teacher_layer=5, heads=24, view="plain", query=0.8 * scale, key=0.7 * scale, value=0.5 * scale
    )
    hidden = tuple(
        HiddenFidelity(student_layer=i, teacher_layer=j, view="plain", nmse=nmse * scale, ridge=0.1)
        for i, j, nmse in ((1, 2, 0.25), (3, 6, 0.75))
    )
    return FidelityReport(
        student="student",
        cache="cache.zarr",
        first_row=980,
        last_row=999,
        held_out=True,
        tokens=2560,
        relations=(relation,),
        hidden=hidden,
        distribution=DistributionFidelity(kl=4 * scale, top1_agreement=0.5 / scale, positions=380, temperature=1.0),
    )


def render(reports: dict[str, FidelityReport]) -> list[list[str]]:
    """The table's lines as cells; those of title and caption as one cell."""
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(fidelity_table(reports))
    text = captured.get()
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in text.splitlines()]


def test_one_report() -> None:
    lines = render({"student": make_report()})
    assert ["measure", "where", "student"] in lines
    assert ["relation KL, query", "3 → 5, 24 heads", "0.8"] in lines
    assert ["relation KL, sum", "3 → 5, 24 heads", "2"] in lines
    assert ["hidden NMSE, mean", "all pairs", "0.5"] in lines
    assert ["top-1 agreement", "380 positions", "50.0%"] in lines
    caption = " ".join(line[0] for line in lines if len(line) == 1)
    assert "held-out rows 980 to 999 of cache.zarr, 2,560 tokens" in caption


def test_two_reports_are_compared() -> None:
    lines = render({"before": make_report(), "after": make_report(0.625)})
    assert ["relation KL, sum", "3 → 5, 24 heads", "2", "1.25", "1.60×"] in lines
    assert ["top-1 agreement", "380 positions", "50.0%", "80.0%", "+30.0 points"] in lines


def test_what_one_report_lacks_is_a_dash() -> None:
    lines = render({"before": make_report(), "after": replace(make_report(), distribution=None)})
    assert ["output KL", "380 positions", "4", "–", "–"] in lines


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.4])
def test_picture(tmp_path: Path, scale: float) -> None:
    """A PNG of a size for a page, drawn without a display, with curve, points and nothing cut off at its edges."""
    from matplotlib.image import imread

    records = [{"step": 0, "valid_loss": 3.0}]
    records += [{"step": step, "loss": 3.0 / step} for step in range(1, 20)]
    records += [{"step": 19, "valid_loss": 0.2}]
    path = tmp_path / "picture.png"
    plot_training(records, {"before": make_report(), "after": make_report(scale)}, path, title="a student")
    pixels = imread(path)[:, :, :3]
    assert pixels.shape[:2] == (648, 1560)
    inked = (pixels < 0.9).any(axis=2)
    left, right = inked[:, : pixels.shape[1] // 2], inked[:, pixels.shape[1] // 2 :]
    assert left.mean() > 0.01 and right.mean() > 0.01
    for edge in (inked[:3], inked[-3:], inked[:, -3:]):
        assert not edge.any()
    for color in ((0x1F, 0x5F, 0xA8), (0xD9, 0x66, 0x1F)):
        assert (np.abs(pixels * 255 - color).max(axis=2) < 8).any(), color


def test_records_need_the_standard_library_only() -> None:
    """Comparisons of many reports, and `--help`, must not wait for torch."""
    code = (
        "import sys; import student_train.evaluate.fidelity.records, student_train.evaluate.fidelity.settings;"
        "import cli.kdeval, cli.demo;"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'zarr') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
