"""Where the teacher of compared students stands in a plot, by what was measured of it beside them.

In: rows of a comparison, each with the records of its runs. Out: its cost and quality, where records tell them and are
of one teacher alone, which is known by its weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator

from student_train.evaluate.compare.compare import Comparison
from student_train.evaluate.run_records import LatencyRecord, RunRecords


def teacher_latency(comparison: Comparison) -> float | None:
    """Median milliseconds of a pass at the setup of the comparison."""
    setup = comparison.setup

    def measure(found: LatencyRecord) -> float | None:
        timing = None if setup is None else found.timings.get(setup)
        return None if timing is None else timing.teacher_median_ms

    return _of_one_teacher(comparison, measure)


def teacher_rate(comparison: Comparison) -> float | None:
    """Tokens generated a second at the setup of the comparison."""
    setup = comparison.generation

    def measure(found: LatencyRecord) -> float | None:
        timing = None if setup is None else found.generation.get(setup)
        return None if timing is None else timing.teacher_tokens_per_second

    return _of_one_teacher(comparison, measure)


def teacher_parameters(comparison: Comparison) -> float | None:
    """Millions of parameters, as latency counted them."""
    return _of_one_teacher(
        comparison, lambda found: None if found.teacher_parameters is None else found.teacher_parameters / 1e6
    )


def teacher_bits(comparison: Comparison) -> float | None:
    """Bits per byte of the text that the rows read, where one teacher read it too."""
    reports = [run.perplexity for run in _runs(comparison) if run.perplexity is not None]
    if len({(found.fingerprints.get("teacher"), found.fingerprints.get("text")) for found in reports}) > 1:
        return None
    return _mean(found.teacher_score.bits_per_byte for found in reports if found.teacher_score is not None)


def _of_one_teacher(comparison: Comparison, measure: Callable[[LatencyRecord], float | None]) -> float | None:
    """The mean over the records; None where no teacher was timed, several were, or one of the rows is the teacher."""
    records = [run.latency for run in _runs(comparison) if run.latency is not None]
    teachers = {found.teacher_weights for found in records if found.teacher_weights is not None}
    if len(teachers) != 1 or not teachers.isdisjoint(run.weights for run in _runs(comparison)):
        return None
    return _mean(value for found in records if (value := measure(found)) is not None)


def _runs(comparison: Comparison) -> Iterator[RunRecords]:
    return (run for row in comparison.rows for run in row.row.runs)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None
