"""A comparison for people: tables for a terminal, and the same as Markdown.

In: a `Comparison`. Out: rich renderables, or text. Columns that no row has anything in are left out: the notes name
what is missing. Scores are in hundredths, as the field writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from student_train.evaluate.compare.compare import AVERAGE, ComparedRow, Comparison
from student_train.evaluate.compare.significance import CONFIDENCE, PairedDifference, Summary
from student_train.evaluate.markdown import markdown_table, plain
from student_train.evaluate.perplexity.records import format_perplexity
from teacher_cache.outside import visible

if TYPE_CHECKING:
    from rich.table import Table

LACKING = "–"
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as text: a title, lines of as many cells as there are columns, and what to know below it."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    caption: str
    words: int
    """So many of the first columns are words, the others numbers."""


def comparison_grids(comparison: Comparison) -> list[Grid]:
    """What each row is and achieves, and where several rows were scored, by how much they differ from the baseline."""
    grids = [_overview(comparison)]
    if any(row.differences for row in comparison.rows):
        grids.append(_differences(comparison))
    return grids


def rich_table(grid: Grid) -> Table:
    """For a terminal."""
    from rich.markup import escape
    from rich.table import Table

    def shown(text: str) -> str:
        return escape(visible(text))

    table = Table(title=shown(grid.title), caption=shown(grid.caption), title_justify="left", caption_justify="left")
    for place, column in enumerate(grid.columns):
        table.add_column(shown(column), justify="left" if place < grid.words else "right", no_wrap=place > 0)
    for line in grid.lines:
        table.add_row(*map(shown, line))
    return table


def markdown(comparison: Comparison) -> str:
    """The tables and the notes."""
    parts = ["# Comparison of students\n"]
    for grid in comparison_grids(comparison):
        table = markdown_table(grid.columns, grid.lines, words=grid.words)
        parts.append(f"## {plain(grid.title)}\n\n{table}\n\n{plain(grid.caption)}\n")
    if comparison.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {plain(note)}" for note in comparison.notes) + "\n")
    return "\n".join(parts)


def _overview(comparison: Comparison) -> Grid:
    words = ("method", "mapping", "init")
    columns = ["run", *words, "shape", "params", "relation KL", "hidden NMSE", "output KL"]
    harness = _harness_columns(comparison)
    columns += ["bits/byte", "perplexity", *harness, *comparison.columns, "fine-tuned", "ms", "speed-up"]
    columns += ["first ms", "tokens/s", "speed-up", "int8 MB", "int8 ms", "int8 cosine"]
    lines = [_overview_line(row, comparison) for row in comparison.rows]
    kept = [place for place in range(len(columns)) if place == 0 or any(line[place] != LACKING for line in lines)]
    return Grid(
        title="Runs",
        columns=tuple(columns[place] for place in kept),
        lines=tuple(tuple(line[place] for place in kept) for line in lines),
        caption=_overview_caption(comparison),
        words=sum(columns[place] in ("run", *words) for place in kept),
    )


def _overview_line(row: ComparedRow, comparison: Comparison) -> list[str]:
    shape, parameters = row.row.shape, row.row.parameters
    return [
        row.name,
        row.row.method or LACKING,
        row.row.mapping or LACKING,
        row.row.init or LACKING,
        LACKING if shape is None else str(shape),
        LACKING if parameters is None else f"{parameters / 1e6:.2f}M",
        *(_number(value) for value in (row.relation_kl, row.hidden_nmse, row.output_kl)),
        _number(row.causal.bits_per_byte),
        LACKING if row.causal.perplexity is None else format_perplexity(row.causal.perplexity),
        *(_number(row.causal.lm_eval.get(name)) for name in _harness_columns(comparison)),
        *(_score(row.scores.get(task)) for task in comparison.columns),
        _saved_score(row),
        LACKING if row.latency_ms is None else f"{row.latency_ms:.3g}{'' if row.timed_as is None else ' ‡'}",
        LACKING if row.speedup is None else f"{row.speedup:.2f}×",
        LACKING if row.causal.first_token_ms is None else f"{row.causal.first_token_ms:.3g}",
        LACKING if row.causal.tokens_per_second is None else f"{row.causal.tokens_per_second:.4g}",
        LACKING if row.causal.speedup is None else f"{row.causal.speedup:.2f}×",
        LACKING if row.int8.bytes is None else f"{row.int8.bytes / 1e6:.1f}",
        LACKING if row.int8.milliseconds is None else f"{row.int8.milliseconds:.3g}",
        LACKING if row.int8.cosine is None else f"{row.int8.cosine:.4f}",
    ]


def _harness_columns(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(name for row in comparison.rows for name in row.causal.lm_eval))


def _number(value: float | None) -> str:
    return LACKING if value is None else f"{value:.3f}"


def _saved_score(row: ComparedRow) -> str:
    saved = row.row.saved
    return LACKING if saved is None or saved.score is None else f"{saved.task} {100 * saved.score:.2f}"


def _score(summary: Summary | None) -> str:
    if summary is None:
        return LACKING
    spread = "" if summary.sd is None else f" ± {100 * summary.sd:.2f}"
    return f"{100 * summary.mean:.2f}{spread}"


def _overview_caption(comparison: Comparison) -> str:
    parts = []
    if comparison.tasks:
        metrics = ", ".join(f"{task}: {metric}" for task, metric in comparison.tasks.items())
        parts.append(
            f"Scores × 100 ({metrics}): mean ± standard deviation over the trainings of a row, or where there is one, "
            "over its fine-tuning seeds."
        )
    if any(row.row.saved is not None for row in comparison.rows):
        parts.append("Fine-tuned: score × 100 of these very weights on the task that they were fine-tuned for.")
    if comparison.setup is not None:
        parts.append(f"Milliseconds: median of {comparison.setup}.")
    if any(row.timed_as is not None for row in comparison.rows):
        parts.append("‡: not timed so itself; the time of another row of the same shape.")
    if any(row.relation_kl or row.hidden_nmse or row.output_kl for row in comparison.rows):
        parts.append("KL in nats and NMSE: distance to the teacher on held-out rows, lower is better.")
    if any(row.causal.bits_per_byte is not None for row in comparison.rows):
        parts.append("Bits per byte and perplexity of text, lower is better; perplexity depends on the tokenizer.")
    harness = _harness_columns(comparison)
    if harness:
        parts.append(f"Of lm-evaluation-harness, as it gives them: {', '.join(harness)}.")
    if comparison.generation is not None:
        parts.append(f"Median milliseconds to the first token, and tokens a second after it: {comparison.generation}.")
    if any(row.int8.bytes is not None for row in comparison.rows):
        parts.append(
            "int8: of the ONNX files of `kdeval export` the one nearest to the model; milliseconds of one row of text, "
            "timed as its onnx.json says, and cosine with the model's output on held-out rows."
        )
    parts.append("Parameters without heads.")
    return " ".join(parts)


def _differences(comparison: Comparison) -> Grid:
    others = [row for row in comparison.rows if row.name != comparison.baseline]
    columns = [task for task in reversed(comparison.columns) if any(task in row.differences for row in others)]
    lines = [(row.name, *(_difference(row.differences.get(task)) for task in columns), _units(row)) for row in others]
    return Grid(
        title=f"Differences to {comparison.baseline}",
        columns=("run", *columns, "n"),
        lines=tuple(lines),
        caption=_differences_caption(others),
        words=1,
    )


def _difference(found: PairedDifference | None) -> str:
    if found is None:
        return LACKING
    mean = f"{100 * found.mean:+.2f}"
    if found.low is None or found.high is None or found.p is None or found.holm is None:
        return mean
    star = "*" if found.holm < SIGNIFICANT else ""
    return f"{mean}{star} [{100 * found.low:+.2f}, {100 * found.high:+.2f}] p {_p(found.holm)}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _units(row: ComparedRow) -> str:
    found = row.differences.get(AVERAGE) or next(iter(row.differences.values()), None)
    return LACKING if found is None else f"{len(found.units)} {found.unit}s{' †' if found.fixed else ''}"


def _differences_caption(rows: Sequence[ComparedRow]) -> str:
    found = [difference for row in rows for difference in row.differences.values()]
    compared = sum(bool(row.differences) for row in rows)
    correction = f"corrected for {compared} rows by Holm's method" if compared > 1 else "of a single comparison"
    how = (
        f"Row minus baseline × 100, paired over the seeds that both have; in brackets the {CONFIDENCE:.0%} confidence "
        f"interval of a paired t-test (of each difference by itself), p {correction}; * is p < {SIGNIFICANT:g}."
    )
    parts = [how]
    if any(difference.unit == "fine-tuning seed" for difference in found):
        parts.append("Over fine-tuning seeds: about these very students, not about what trained them.")
    if any(difference.p is None for difference in found):
        parts.append("Without brackets: one seed, or differences without spread; nothing can be tested.")
    if any(difference.fixed for difference in found):
        parts.append("†: one side was trained once and stands against every training of the other.")
    return " ".join(parts)
