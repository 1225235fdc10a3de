"""What a comparison says of causal students: perplexity, bits per byte, speed of answers, scores of the harness.

In: rows. Out: `CausalMeasures`, one for each row, mean over its runs. A model that was measured beside others as their
teacher has what their records tell of it. Nothing is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from student_train.evaluate.compare.rows import Row, most_common_setup
from student_train.evaluate.latency.generation_records import GenerationSetup, GenerationTiming
from student_train.evaluate.perplexity.records import TextScore
from student_train.evaluate.run_records import RunRecords


@dataclass(frozen=True, kw_only=True)
class CausalMeasures:
    """None and absent tasks are what no record tells. `lm_eval` is by `task metric`; speeds are of the common setup."""

    perplexity: float | None = None
    bits_per_byte: float | None = None
    lm_eval: Mapping[str, float] = field(default_factory=dict)
    first_token_ms: float | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object; a perplexity beyond all numbers is null."""
        return {
            "perplexity": self.perplexity if self.perplexity is not None and math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "lm_eval": dict(self.lm_eval),
            "generation": {
                "first_token_ms": self.first_token_ms,
                "tokens_per_second": self.tokens_per_second,
                "speedup": self.speedup,
            },
        }


def causal_measures(row: Row, rows: Sequence[Row], setup: GenerationSetup | None) -> CausalMeasures:
    """Of one of the rows; `setup` is what speeds are of."""
    as_teacher = list(_as_teacher(row, rows))
    timings = [
        run.latency.generation[setup]
        for run in row.runs
        if setup is not None and run.latency is not None and setup in run.latency.generation
    ]
    lent = list(_lent_timings(row, rows, setup))
    own = [timing.speedup for timing in timings if timing.speedup is not None]
    return CausalMeasures(
        perplexity=_score(row, as_teacher, lambda score: score.perplexity),
        bits_per_byte=_score(row, as_teacher, lambda score: score.bits_per_byte),
        lm_eval=_lm_eval(row.runs),
        first_token_ms=_mean([timing.first_token_ms for timing in timings] or [first for first, _ in lent]),
        tokens_per_second=_mean([timing.tokens_per_second for timing in timings] or [rate for _, rate in lent]),
        speedup=_mean(own or ([1.0] if lent and not timings else [])),
    )


def common_generation(rows: Sequence[Row]) -> GenerationSetup | None:
    """What most rows generated; of several such one answer at a time, on a CPU, the longest prompt, fewest threads."""
    return most_common_setup(
        rows,
        lambda run: () if run.latency is None else run.latency.generation,
        lambda each: (each.batch_size, each.device != "cpu", -each.prompt_tokens, each.threads, each),
    )


def _score(row: Row, as_teacher: Sequence[TextScore], value: Callable[[TextScore], float]) -> float | None:
    own = row.mean(lambda run: None if run.perplexity is None else value(run.perplexity.student_score))
    return own if own is not None else _mean([value(score) for score in as_teacher])


def _as_teacher(row: Row, rows: Sequence[Row]) -> Iterator[TextScore]:
    """Scores of this model as the teacher beside which others were measured."""
    weights = {run.weights for run in row.runs} - {None}
    for run in _runs(rows):
        found = run.perplexity
        if found is not None and found.teacher_score is not None and found.fingerprints.get("teacher") in weights:
            yield found.teacher_score


def _lent_timings(row: Row, rows: Sequence[Row], setup: GenerationSetup | None) -> Iterator[tuple[float, float]]:
    weights = {run.weights for run in row.runs} - {None}
    for run in _runs(rows):
        if setup is None or run.latency is None or run.latency.teacher_weights not in weights:
            continue
        timing: GenerationTiming | None = run.latency.generation.get(setup)
        if timing is None or timing.teacher_first_token_ms is None or timing.teacher_tokens_per_second is None:
            continue
        yield timing.teacher_first_token_ms, timing.teacher_tokens_per_second


def _lm_eval(runs: Sequence[RunRecords]) -> dict[str, float]:
    """The metric that stands for each named task, of tasks that all the runs have."""
    found = [
        {f"{result.task} {result.main}": result.metrics[result.main].value for result in run.lm_eval.named}
        for run in runs
        if run.lm_eval is not None
    ]
    if len(found) < len(runs):
        return {}
    return {
        name: statistics.fmean(each[name] for each in found) for name in found[0] if all(name in each for each in found)
    }


def _runs(rows: Sequence[Row]) -> Iterator[RunRecords]:
    return (run for row in rows for run in row.runs)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
