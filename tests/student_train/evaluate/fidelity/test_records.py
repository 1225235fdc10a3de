"""Tables and pictures of fidelity reports: what a reader is told, and that the picture shows it."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

from rich.console import Console

from student_train.evaluate.fidelity.records import (
    FidelityReport,
    fidelity_table,
)
from tests.student_train.evaluate.reports import make_report


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


def test_records_need_the_standard_library_only() -> None:
    """Comparisons of many reports, and `--help`, must not wait for torch."""
    code = (
        "import sys; import student_train.evaluate.fidelity.records, student_train.evaluate.fidelity.settings;"
        "import cli.kdeval, cli.demo;"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'zarr') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
