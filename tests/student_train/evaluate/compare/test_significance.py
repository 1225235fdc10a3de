"""What a difference is worth: paired t-tests against scipy's, and Holm's correction against its example."""

from __future__ import annotations

import statistics
import sys

import numpy as np
import pytest
from scipy import stats

from student_train.evaluate.compare.significance import (
    PairedDifference,
    Scores,
    average_tasks,
    correct_holm,
    paired_difference,
    summarise,
)
from teacher_cache.errors import SettingsError


def draws(trainings: int, seeds: int, level: float, seed: int) -> Scores:
    draw = np.random.default_rng(seed)
    return {t: {s: level + float(draw.normal(0, 0.02)) for s in range(seeds)} for t in range(trainings)}


def test_several_trainings_are_the_unit() -> None:
    """Against the textbook: a paired t-test of the trainings' means, whatever number of fine-tunings is behind them."""
    row, base = draws(4, 3, 0.7, 0), draws(4, 3, 0.68, 1)
    found = paired_difference(row, base)
    means = [[statistics.fmean(scores[t].values()) for t in range(4)] for scores in (row, base)]
    expected = stats.ttest_rel(*means)
    assert found is not None and found.unit == "training seed" and found.units == (0, 1, 2, 3) and not found.fixed
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.mean == pytest.approx(statistics.fmean(means[0]) - statistics.fmean(means[1]))


def test_one_training_is_tested_over_its_fine_tuning_seeds() -> None:
    row, base = {0: {0: 0.7, 1: 0.72, 2: 0.75}}, {0: {1: 0.7, 2: 0.71, 3: 0.1}}
    found = paired_difference(row, base)
    assert found is not None and (found.unit, found.units) == ("fine-tuning seed", (1, 2))
    assert found.mean == pytest.approx(0.03) and found.p == pytest.approx(stats.ttest_1samp([0.02, 0.04], 0).pvalue)


def test_only_what_both_have_is_paired() -> None:
    row, base = draws(4, 2, 0.7, 0), draws(4, 2, 0.6, 1)
    assert paired_difference({t: row[t] for t in (0, 1, 3)}, {t: base[t] for t in (1, 2, 3)}).units == (1, 3)
    assert paired_difference({0: row[0], 1: row[1]}, {2: base[2], 3: base[3]}) is None
    assert paired_difference({0: {0: 0.5}}, {0: {1: 0.5}}) is None


def test_a_single_teacher_stands_against_every_training() -> None:
    row, teacher = draws(3, 2, 0.7, 0), {None: {0: 0.8, 1: 0.82}}
    found = paired_difference(row, teacher)
    assert found is not None and found.fixed and (found.unit, found.units) == ("training seed", (0, 1, 2))
    assert found.p == pytest.approx(
        stats.ttest_1samp([statistics.fmean(row[t].values()) - 0.81 for t in row], 0).pvalue
    )
    assert paired_difference(teacher, row).mean == pytest.approx(-found.mean)


@pytest.mark.parametrize("scores", [{0: {0: 0.7}}, {0: {0: 0.6 + 0.1, 1: 0.8, 2: 0.9}}])
def test_without_spread_nothing_is_tested(scores: Scores) -> None:
    """One unit; or differences that are the same but for rounding, of which a t-test would make certainty."""
    base = {0: {seed: score - 0.1 for seed, score in scores[0].items()}}
    found = paired_difference(scores, base)
    assert found is not None and found.mean == pytest.approx(0.1)
    assert found.p is None and found.low is None


def test_holm() -> None:
    """The example of the method: 0.01, 0.04, 0.03, 0.005 -> 0.03, 0.06, 0.06, 0.02."""
    given = [PairedDifference(unit="", units=(0, 1), mean=0, p=p) for p in (0.01, 0.04, 0.03, 0.005)]
    untested = PairedDifference(unit="", units=(0,), mean=0)
    corrected = correct_holm([given[0], None, *given[1:], untested])
    assert corrected[1] is None and corrected[-1] == untested
    assert [each.holm for each in corrected if each and each.p] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_summaries() -> None:
    trainings = {0: {0: 0.5, 1: 0.7}, 1: {0: 0.8, 1: 0.8}}
    found = summarise(trainings)
    assert (found.n, found.unit) == (2, "training seed")
    assert (found.mean, found.sd) == pytest.approx((0.7, statistics.stdev([0.6, 0.8])))
    assert summarise({0: {0: 0.5}}).sd is None
    assert average_tasks([trainings, {1: {1: 0.2, 5: 0.9}}]) == {1: {1: pytest.approx(0.5)}}


def test_without_scipy_seeds_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # as where it is not installed
    with pytest.raises(SettingsError, match=r"needs scipy.*4 seeds.*pip install 'kdcache\[eval\]'"):
        paired_difference(draws(4, 2, 0.7, 0), draws(4, 2, 0.6, 1))
    one = paired_difference({0: {0: 0.7}}, {0: {0: 0.6}})
    assert one is not None and one.p is None
