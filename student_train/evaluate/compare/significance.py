"""Whether one row of a comparison is better than another: differences paired over seeds, and how certain they are.

In: scores by training seed and fine-tuning seed. Out: the mean difference with its 95% confidence interval and p-value
(paired t-test), the number of units and what a unit is. Where students were trained several times, a training is the
unit, its fine-tuning seeds averaged: two fine-tunings of one student say nothing about the next training. Otherwise the
unit is the fine-tuning seed, and the result is about these very students, not about their methods. Several comparisons
are corrected for by Holm's method. Pure functions; the t distribution is SciPy's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from teacher_cache.errors import SettingsError

CONFIDENCE = 0.95
_SAME = 1e-12

Scores = Mapping[int | None, Mapping[int, float]]
"""By training seed (None: not trained by kdtrain), then by fine-tuning seed."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean of `n` units and their standard deviation (of a sample; None for one unit)."""

    unit: str
    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Row minus baseline over the `units` (seeds) that both have.

    `low`, `high` and `p` are None where there is one unit, or all differences are the same: nothing can be tested.
    `holm` is p after Holm's correction. `fixed` says that one side was trained once and stands against every training
    of the other: how its own training might have turned out is then not in the interval.
    """

    unit: str
    units: tuple[int, ...]
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    holm: float | None = None
    fixed: bool = False

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        return {**asdict(self), "units": list(self.units), "n": len(self.units)}


def summarise(scores: Scores) -> Summary:
    """Mean and spread over trainings, or where there is one, over its fine-tuning seeds."""
    if len(scores) > 1:
        units, unit = [statistics.fmean(each.values()) for each in scores.values()], "training seed"
    else:
        units, unit = list(next(iter(scores.values())).values()), "fine-tuning seed"
    deviation = statistics.stdev(units) if len(units) > 1 else None
    return Summary(unit=unit, n=len(units), mean=statistics.fmean(units), sd=deviation)


def average_tasks(by_task: Sequence[Scores]) -> Scores:
    """Scores averaged over tasks, of every training and fine-tuning seed that has all of them."""
    trainings = set.intersection(*(set(scores) for scores in by_task))
    averaged = {}
    for training in sorted(trainings, key=_seed_order):
        seeds = set.intersection(*(set(scores[training]) for scores in by_task))
        if seeds:
            averaged[training] = {
                seed: statistics.fmean(scores[training][seed] for scores in by_task) for seed in sorted(seeds)
            }
    return averaged


def paired_difference(row: Scores, baseline: Scores) -> PairedDifference | None:
    """Row minus baseline; None where they have no seed in common.

    Raises:
        SettingsError: several seeds are to be compared, and SciPy is not installed.
    """
    matched = {
        pair: _differences(row[pair[0]], baseline[pair[1]])
        for pair in _match(row, baseline)
        if row[pair[0]].keys() & baseline[pair[1]].keys()
    }
    if not matched:
        return None
    if len(matched) == 1:
        by_seed = next(iter(matched.values()))
        return _test("fine-tuning seed", by_seed, fixed=False)
    trainings = {_own_seed(pair, row): statistics.fmean(differences.values()) for pair, differences in matched.items()}
    return _test("training seed", trainings, fixed=min(len(row), len(baseline)) == 1)


def correct_holm(differences: Sequence[PairedDifference | None]) -> list[PairedDifference | None]:
    """The same with `holm` filled in: p-values corrected for all that have one (Holm, 1979)."""
    order = sorted((each.p, place) for place, each in enumerate(differences) if each is not None and each.p is not None)
    corrected, highest = list(differences), 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        found = differences[place]
        assert found is not None
        corrected[place] = replace(found, holm=highest)
    return corrected


def _match(row: Scores, baseline: Scores) -> list[tuple[int | None, int | None]]:
    """Which training of the row stands against which of the baseline."""
    common = sorted(row.keys() & baseline.keys(), key=_seed_order)
    if len(common) > 1:
        return [(seed, seed) for seed in common]
    if len(row) == 1 or len(baseline) == 1:
        return [(one, other) for one in sorted(row, key=_seed_order) for other in sorted(baseline, key=_seed_order)]
    return [(seed, seed) for seed in common]


def _own_seed(pair: tuple[int | None, int | None], row: Scores) -> int:
    """The seed that tells this pair from the others."""
    seed = pair[1] if len(row) == 1 else pair[0]
    assert seed is not None
    return seed


def _differences(row: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    return {seed: row[seed] - baseline[seed] for seed in sorted(row.keys() & baseline.keys())}


def _test(unit: str, by_unit: Mapping[int, float], *, fixed: bool) -> PairedDifference:
    values = list(by_unit.values())
    found = PairedDifference(unit=unit, units=tuple(by_unit), mean=statistics.fmean(values), fixed=fixed)
    # differences that agree to the last digit have no spread that could be compared with their mean
    if len(values) < 2 or max(values) - min(values) <= _SAME * max(1.0, *map(abs, values)):
        return found
    try:
        from scipy import stats
    except ImportError as error:
        raise SettingsError(
            f"kdeval compare needs scipy for what {len(values)} seeds say about a difference, which is not installed: "
            "pip install 'kdcache[eval]'"
        ) from error

    result = stats.ttest_1samp(values, 0.0)
    interval = result.confidence_interval(CONFIDENCE)
    if not math.isfinite(result.pvalue):
        return found
    return replace(found, low=float(interval.low), high=float(interval.high), p=float(result.pvalue))


def _seed_order(seed: int | None) -> int:
    return -1 if seed is None else seed
