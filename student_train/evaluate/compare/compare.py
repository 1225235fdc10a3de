"""Runs side by side: what `kdeval compare` finds in the records that training and measurements left.

In: directories of students, of their teacher, of anybody's model that `kdeval` measured. Out: a `Comparison`: one row
per model (trainings that differ in their seed alone are one), its fidelity, its scores on every task, its latency, of
causal ones also perplexity and speed of generation, and whether each row differs from the baseline by more than its
seeds explain. Nothing is measured and no model is loaded. What is missing is named in `notes` with the command that
makes it, and so is whatever makes rows hard to compare.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from student_train.evaluate.compare.causal import CausalMeasures, causal_measures, common_generation
from student_train.evaluate.compare.int8 import Int8Measures, int8_measures
from student_train.evaluate.compare.notes import comparison_notes
from student_train.evaluate.compare.rows import Row, make_rows, most_common_setup
from student_train.evaluate.compare.significance import (
    PairedDifference,
    Scores,
    Summary,
    average_tasks,
    correct_holm,
    paired_difference,
    summarise,
)
from student_train.evaluate.latency.generation_records import GenerationSetup
from student_train.evaluate.run_records import RunRecords, TimingSetup, read_run
from teacher_cache.errors import StudentError

AVERAGE = "average"


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """One line of the comparison; None and absent tasks are what no record tells.

    `scores` and `differences` (to the baseline) are by task, and under `average` over all tasks of the comparison.
    `timed_as` is the row of the same shape whose latency this is, where this one was not timed.
    """

    row: Row
    relation_kl: float | None
    hidden_nmse: float | None
    output_kl: float | None
    scores: Mapping[str, Summary]
    differences: Mapping[str, PairedDifference]
    latency_ms: float | None
    speedup: float | None
    timed_as: str | None = None
    causal: CausalMeasures = field(default_factory=CausalMeasures)
    int8: Int8Measures = field(default_factory=Int8Measures)

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        return self.row.name

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        row = self.row
        return {
            "name": row.name,
            "runs": [run.path for run in row.runs],
            "training_seeds": list(row.seeds),
            "method": row.method,
            "mapping": row.mapping,
            "init": row.init,
            "shape": None if row.shape is None else str(row.shape),
            "parameters": row.parameters,
            "fidelity": {
                "relation_kl": self.relation_kl,
                "hidden_nmse": self.hidden_nmse,
                "output_kl": self.output_kl,
            },
            "fine_tuned": None if row.saved is None else row.saved.to_json(),
            "scores": {task: asdict(each) for task, each in self.scores.items()},
            "scores_by_run": {task: by_run for task in self.scores if (by_run := self._by_run(task))},
            "differences": {task: found.to_json() for task, found in self.differences.items()},
            "latency_ms": self.latency_ms,
            "speedup": self.speedup,
            "timed_as": self.timed_as,
            **self.causal.to_json(),
            "int8": self.int8.to_json(),
        }

    def _by_run(self, task: str) -> dict[str, dict[str, float]]:
        """The scores behind a mean, by run and fine-tuning seed."""
        return {
            run.path: {str(seed): score for seed, score in run.tasks[task].scores.items()}
            for run in self.row.runs
            if task in run.tasks
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows; `baseline` is the one that differences are to, `setup` and `generation` what the speeds are of."""

    rows: tuple[ComparedRow, ...]
    baseline: str
    tasks: Mapping[str, str]
    setup: TimingSetup | None
    notes: tuple[str, ...]
    generation: GenerationSetup | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The tasks, and where there are several their average."""
        return (*self.tasks, AVERAGE) if len(self.tasks) > 1 else tuple(self.tasks)

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "baseline": self.baseline,
            "tasks": dict(self.tasks),
            "latency_setup": None if self.setup is None else asdict(self.setup),
            "generation_setup": None if self.generation is None else asdict(self.generation),
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }


def compare_runs(paths: Sequence[str], *, baseline: str | None = None) -> Comparison:
    """Read the records of runs and compare them.

    Args:
        paths: directories; one given twice counts once. What is no run, or has a record that is damaged or of
            something else, is left out and named in the notes.
        baseline: one of them, or a further one (default: the first that can be read).

    Raises:
        StudentError: there is nothing to read in any of them or in the baseline, or the same task was measured by
            different metrics.
    """
    runs, left_out = _read_all(paths if baseline is None else [*_lacking(baseline, paths), *paths], baseline)
    rows = make_rows(runs)
    place = _place(runs[0].path if baseline is None else baseline)
    base = next(row for row in rows if any(_place(run.path) == place for run in row.runs))
    tasks = _tasks(runs)
    setup, generation = _common_setup(rows), common_generation(rows)
    scores = {row.name: _scores(row, tasks) for row in rows}
    differences = _differences(rows, base, scores)
    timed = {row.name: _teacher_time(row, rows, setup) for row in rows}
    measured = tuple(
        ComparedRow(
            row=row,
            relation_kl=row.mean(lambda run: None if run.fidelity is None else run.fidelity.relation_mean),
            hidden_nmse=row.mean(lambda run: None if run.fidelity is None else run.fidelity.hidden_mean),
            output_kl=row.mean(_output_kl),
            scores={task: summarise(each) for task, each in scores[row.name].items()},
            differences=differences[row.name],
            latency_ms=_latency(row, setup) or timed[row.name],
            speedup=_speedup(row, setup) or (1.0 if timed[row.name] else None),
            causal=causal_measures(row, rows, generation),
            int8=int8_measures(row),
        )
        for row in rows
    )
    compared = tuple(_timed_by_shape(row, measured) for row in measured)
    with_time = [row.name for row in compared if row.latency_ms or row.causal.tokens_per_second]
    read = [row.name for row in compared if row.causal.bits_per_byte is not None]
    notes = comparison_notes(rows, tasks, generation if setup is None else setup, timed=with_time, read=read)
    return Comparison(
        rows=compared,
        baseline=base.name,
        tasks=tasks,
        setup=setup,
        generation=generation,
        notes=(*left_out, *notes),
    )


def _timed_by_shape(row: ComparedRow, rows: Sequence[ComparedRow]) -> ComparedRow:
    """What was not timed takes as long as the first row of the same shape: time is a matter of the shape alone."""
    if row.latency_ms is not None or row.row.shape is None:
        return row
    timed = (other for other in rows if other.latency_ms is not None and other.row.shape == row.row.shape)
    alike = next(timed, None)
    if alike is None:
        return row
    return replace(row, latency_ms=alike.latency_ms, speedup=alike.speedup, timed_as=alike.name)


def _place(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _lacking(baseline: str, paths: Sequence[str]) -> list[str]:
    return [] if _place(baseline) in map(_place, paths) else [baseline]


def _read_all(paths: Sequence[str], baseline: str | None) -> tuple[list[RunRecords], list[str]]:
    """What can be read, and what has to be said of the rest: a pattern such as `students/*` matches more than runs."""
    runs, left_out = [], []
    places = {_place(path): path for path in reversed(paths)}
    for place, path in reversed(places.items()):
        try:
            if place.is_file():
                raise StudentError(f"{path!r} is a file, and no run")
            runs.append(read_run(path))
        except StudentError as error:
            if len(places) == 1 or (baseline is not None and place == _place(baseline)):
                raise
            left_out.append(f"left out: {error}")
    if not runs:
        raise StudentError("\n".join(["nothing is left to compare:", *left_out]))
    return runs, left_out


def _tasks(runs: Sequence[RunRecords]) -> dict[str, str]:
    """Every task that some run has, with its metric."""
    first: dict[str, RunRecords] = {}
    for run in runs:
        for task, found in run.tasks.items():
            other = first.setdefault(task, run)
            if other.tasks[task].metric != found.metric:
                raise StudentError(
                    f"{str(run.folder)!r} has {found.metric!r} as 'metric' of {task!r}, {str(other.folder)!r} has "
                    f"{other.tasks[task].metric!r}: such scores cannot be compared; measure one of them again with "
                    f"`kdeval finetune --task {task}`"
                )
    return {task: run.tasks[task].metric for task, run in sorted(first.items())}


def _scores(row: Row, tasks: Mapping[str, str]) -> dict[str, Scores]:
    """By task, and the average of all tasks for rows that have all."""
    found = {task: scores for task in tasks if (scores := row.scores(task))}
    if len(found) == len(tasks) > 1 and (average := average_tasks(list(found.values()))):
        found[AVERAGE] = average
    return found


def _differences(
    rows: Sequence[Row], base: Row, scores: Mapping[str, Mapping[str, Scores]]
) -> dict[str, dict[str, PairedDifference]]:
    """By row and task, corrected for the number of rows that are compared on the task."""
    found: dict[str, dict[str, PairedDifference]] = {row.name: {} for row in rows}
    others = [row.name for row in rows if row is not base]
    for task, reference in scores[base.name].items():
        differences = [
            paired_difference(scores[name][task], reference) if task in scores[name] else None for name in others
        ]
        for name, difference in zip(others, correct_holm(differences), strict=True):
            if difference is not None:
                found[name][task] = difference
    return found


def _output_kl(run: RunRecords) -> float | None:
    distribution = run.fidelity.distribution if run.fidelity is not None else None
    return None if distribution is None else distribution.kl


def _common_setup(rows: Sequence[Row]) -> TimingSetup | None:
    """What most rows were timed on; of several such the smallest batch, plain PyTorch, a CPU, the longest input."""
    return most_common_setup(
        rows,
        lambda run: () if run.latency is None else run.latency.timings,
        lambda each: (
            each.batch_size, each.backend != "pytorch", each.device != "cpu", -each.seq_len, each.threads, each,
        ),
    )  # fmt: skip


def _latency(row: Row, setup: TimingSetup | None) -> float | None:
    return None if setup is None else row.milliseconds(setup)


def _speedup(row: Row, setup: TimingSetup | None) -> float | None:
    return None if setup is None else row.speedup(setup)


def _teacher_time(row: Row, rows: Sequence[Row], setup: TimingSetup | None) -> float | None:
    """How long this model took as the teacher beside which others were timed; None where it was nobody's."""
    times = [
        timing.teacher_median_ms
        for other in rows
        for run in other.runs
        if run.latency is not None and run.latency.teacher_weights in {each.weights for each in row.runs} - {None}
        for each, timing in run.latency.timings.items()
        if each == setup and timing.teacher_median_ms is not None
    ]
    return statistics.fmean(times) if times else None
