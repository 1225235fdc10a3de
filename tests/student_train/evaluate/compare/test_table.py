"""A comparison as tables: which columns there are, how numbers are written, what stands below."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from student_train.evaluate.compare.compare import ComparedRow, Comparison
from student_train.evaluate.compare.rows import Row
from student_train.evaluate.compare.significance import PairedDifference, Summary
from student_train.evaluate.compare.table import comparison_grids, markdown, rich_table
from student_train.evaluate.run_records import TimingSetup, read_run

SETUP = TimingSetup(backend="pytorch", device="cpu", dtype="float32", threads=2, batch_size=1, seq_len=128)
TESTED = PairedDifference(
    unit="training seed", units=(0, 1, 2), mean=0.0125, low=0.002, high=0.023, p=0.02, holm=0.04
)  # fmt: skip


@pytest.fixture
def comparison(make_run: Any) -> Comparison:
    """Two rows on two tasks; the second one lacks one task and all of its fidelity."""

    def row(name: str, **found: Any) -> ComparedRow:
        settings = {"relation_kl": None, "hidden_nmse": None, "output_kl": None, "latency_ms": None, "speedup": None}
        runs = (read_run(str(make_run(name))),)
        return ComparedRow(row=Row(name=name, runs=runs), **{"scores": {}, "differences": {}, **settings, **found})

    several = Summary(unit="training seed", n=3, mean=0.7, sd=0.0123)
    one = Summary(unit="fine-tuning seed", n=1, mean=0.6849, sd=None)
    return Comparison(
        rows=(
            row(
                "base",
                scores={"rte": several, "sst2": several, "average": several},
                relation_kl=0.8514,
                latency_ms=12.345,
                speedup=2.0,
            ),
            row("a|b", scores={"sst2": one}, differences={"sst2": TESTED}),
        ),
        baseline="base",
        tasks={"rte": "accuracy", "sst2": "accuracy"},
        setup=SETUP,
        notes=("something is missing",),
    )


def test_columns_without_anything_in_them_are_left_out(comparison: Comparison) -> None:
    overview, _ = comparison_grids(comparison)
    assert overview.columns == ("run", "method", "init", "relation KL", "rte", "sst2", "average", "ms", "speed-up")
    assert overview.words == 3
    spread = "70.00 ± 1.23"
    assert overview.lines == (
        ("base", "mha", "auto", "0.851", spread, spread, spread, "12.3", "2.00×"),
        ("a|b", "mha", "auto", "–", "–", "68.49", "–", "–", "–"),
    )
    assert "rte: accuracy, sst2: accuracy" in overview.caption and f"median of {SETUP}." in overview.caption
    assert "KL in nats" in overview.caption and "‡" not in overview.caption


def test_a_time_of_another_row_is_marked(comparison: Comparison) -> None:
    lent = replace(comparison.rows[1], latency_ms=12.345, speedup=2.0, timed_as="base")
    (overview, *_) = comparison_grids(replace(comparison, rows=(comparison.rows[0], lent)))
    assert overview.lines[1][-2:] == ("12.3 ‡", "2.00×") and "‡: not timed so itself" in overview.caption


@pytest.mark.parametrize(
    "changes, cell, n, said",
    [
        ({}, "+1.25* [+0.20, +2.30] p 0.040", "3 training seeds", "paired t-test"),
        ({"holm": 0.0004}, "+1.25* [+0.20, +2.30] p <0.001", "3 training seeds", "* is p < 0.05"),
        ({"holm": 0.05}, "+1.25 [+0.20, +2.30] p 0.050", "3 training seeds", "of a single comparison"),
        ({"fixed": True}, "+1.25* [+0.20, +2.30] p 0.040", "3 training seeds †", "†: one side was trained once"),
        (
            {"unit": "fine-tuning seed", "units": (0,), "low": None, "high": None, "p": None, "holm": None},
            "+1.25",
            "1 fine-tuning seeds",
            "Without brackets: one seed",
        ),
    ],
)
def test_differences(comparison: Comparison, changes: dict[str, Any], cell: str, n: str, said: str) -> None:
    row = replace(comparison.rows[1], differences={"sst2": replace(TESTED, **changes)})
    _, differences = comparison_grids(replace(comparison, rows=(comparison.rows[0], row)))
    assert differences.title == "Differences to base" and differences.columns == ("run", "sst2", "n")
    assert differences.lines == (("a|b", cell, n),)
    assert said in differences.caption


def test_the_correction_is_for_all_rows_compared(comparison: Comparison) -> None:
    base, row = comparison.rows
    third = replace(row, row=replace(row.row, name="c"), differences={"sst2": replace(TESTED, mean=-0.01)})
    _, differences = comparison_grids(replace(comparison, rows=(base, row, third)))
    assert "corrected for 2 rows by Holm's method" in differences.caption and differences.lines[1][1].startswith(
        "-1.00"
    )


def test_without_differences_there_is_one_table(comparison: Comparison) -> None:
    assert len(comparison_grids(replace(comparison, rows=comparison.rows[:1]))) == 1


def test_markdown(comparison: Comparison) -> None:
    text = markdown(comparison)
    assert text.startswith("# Comparison of students\n\n## Runs\n\n| run | method | init | relation KL | rte |")
    assert "\n| :-- | :-- | :-- | --: | --: |" in text
    # a bar in a name is no border
    assert r"| a\|b | mha |" in text
    assert text.rstrip().endswith("## Notes\n\n- something is missing")
    assert "## Notes" not in markdown(replace(comparison, notes=()))


def test_for_a_terminal(comparison: Comparison) -> None:
    """Brackets of intervals are text, not markup."""
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        for grid in comparison_grids(comparison):
            console.print(rich_table(grid))
    text = captured.get()
    assert "+1.25* [+0.20, +2.30] p 0.040" in text and "70.00 ± 1.23" in text and "a|b" in text


NASTY = "<script>x</script> & &lt; `b` | [c](javascript:d) [/e] \\* \x1b[31m\nf"


def test_names_are_text_in_markdown_and_on_a_terminal(comparison: Comparison) -> None:
    row = replace(comparison.rows[1], row=replace(comparison.rows[1].row, name=NASTY))
    nasty = replace(comparison, rows=(row, comparison.rows[0]), baseline=NASTY, notes=(NASTY,), tasks={"rte": NASTY})
    text = markdown(nasty)
    plain = r"&lt;script>x&lt;/script> & &amp;lt; \`b\` | [c\](javascript:d) [/e] \\\* \x1b[31m\nf"
    assert f"- {plain}\n" in text and f"## Differences to {plain}\n" in text
    assert "| " + plain.replace("|", r"\|") + " |" in text
    assert "<script" not in text and "\x1b" not in text
    console = Console(file=io.StringIO(), width=400)
    for grid in comparison_grids(nasty):
        console.print(rich_table(grid))
    printed = console.file.getvalue()
    assert r"<script>x</script> & &lt; `b` | [c](javascript:d) [/e] \* \x1b[31m\nf" in printed and "\x1b" not in printed
