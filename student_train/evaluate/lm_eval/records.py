"""What lm-evaluation-harness found, as plain records that turn into JSON and back, and as a table for people.

`kdeval lm-eval` writes an `LmEvalReport` into the student's directory as lm-eval.json. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from student_train.evaluate.schemas import LmEvalSchema
from teacher_cache.fields import check_fields
from teacher_cache.outside import visible

if TYPE_CHECKING:
    from rich.table import Table

LACKING = "–"
_FIRST = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "byte_perplexity", "word_perplexity")
"""Of several metrics of a task, which one stands for it."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number as the harness gives it, with its standard error; what is not known is None."""

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A task, or a group of tasks with metrics of its own. `group` is the one that brought it, if it was not named.

    Metrics are named as in the harness, `exact_match,strict-match` where it has filters. `examples` and `shots` are
    None for groups.
    """

    task: str
    metrics: Mapping[str, Metric]
    group: str | None
    version: str | None
    shots: int | None
    examples: int | None
    config_sha256: str | None

    @property
    def main(self) -> str:
        """The metric that stands for the task."""
        for wanted in _FIRST:
            for name in self.metrics:
                if name.partition(",")[0] == wanted:
                    return name
        return next(iter(self.metrics))

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {**asdict(self), "main": self.main}


@dataclass(frozen=True, kw_only=True)
class LmEvalReport:
    """All tasks of one run of the harness, those of a group after it."""

    student: str
    results: tuple[TaskResult, ...]
    limit: int | None
    dtype: str
    device: str
    harness: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[TaskResult, ...]:
        """Those that were asked for by name."""
        return tuple(result for result in self.results if result.group is None)

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "student": self.student,
            "results": [result.to_json() for result in self.results],
            "limit": self.limit,
            "dtype": self.dtype,
            "device": self.device,
            "harness": self.harness,
            "fingerprints": dict(self.fingerprints),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LmEvalReport:
        """From what `to_json` gave.

        Raises:
            ValueError: it is none; the message names the field.
        """
        fields = check_fields(LmEvalSchema, record).model_dump()
        results = [
            {**each, "metrics": {name: Metric(**metric) for name, metric in each["metrics"].items()}}
            for each in fields["results"]
        ]
        lists: dict[str, Any] = {
            "results": tuple(TaskResult(**each) for each in results),
            "notes": tuple(fields["notes"]),
        }
        return cls(**{**fields, **lists})


COLUMNS = ("task", "metric", "value", "± stderr", "shots", "questions")


def result_lines(result: TaskResult) -> list[list[str]]:
    """A line of the table for each metric; what is of the whole task stands in the first."""
    lines = []
    for place, (name, metric) in enumerate(result.metrics.items()):
        shots, examples = (LACKING if each is None else f"{each:,}" for each in (result.shots, result.examples))
        whole = [f"{'  ' if result.group else ''}{result.task}", shots, examples] if place == 0 else ["", "", ""]
        better = {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]
        stderr = LACKING if metric.stderr is None else _number(metric.stderr)
        lines.append([whole[0], f"{name}{better}", _number(metric.value), stderr, *whole[1:]])
    return lines


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def lm_eval_table(name: str, report: LmEvalReport) -> Table:
    """A line for each metric of each task."""
    from rich.markup import escape
    from rich.table import Table

    limited = "" if report.limit is None else f"; the first {report.limit} questions of each task"
    table = Table(
        title=f"lm-evaluation-harness on {escape(visible(name))}",
        caption=f"harness {report.harness}{limited}; ↑: higher is better",
        title_justify="left",
        caption_justify="left",
    )
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if place < 2 else "right", no_wrap=place == 1)
    for result in report.results:
        for line in result_lines(result):
            table.add_row(*(escape(visible(cell)) for cell in line))
    return table
