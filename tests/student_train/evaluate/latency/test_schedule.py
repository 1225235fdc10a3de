"""Which sizes are timed in a given time, and for how long each."""

from __future__ import annotations

import pytest

from student_train.evaluate.latency.schedule import Size, plan_sizes

SIZES = [Size.of(batch_size, length) for batch_size in (1, 10) for length in (10, 100)]


def test_what_fits_is_planned_and_what_does_not_is_named() -> None:
    timed = []

    def time_pair(size: Size) -> float:
        timed.append(size.tokens)
        return size.tokens / 100

    # four pairs of 0.1 s with two threads, and with one that takes twice as long: 1.2 s; the next sizes 12 s each
    plan = plan_sizes(SIZES, [1, 2], seconds=26, time_pair=time_pair)
    assert [size.tokens for size in plan.seconds] == [10, 100, 100]
    spare = (26 - 1.2 - 2 * 12) / 6
    assert plan.seconds[Size.of(1, 10)] == pytest.approx({1: 0.8 + spare, 2: 0.4 + spare})
    assert plan.seconds[Size.of(10, 10)] == pytest.approx({1: 8 + spare, 2: 4 + spare})
    assert plan.left_out == pytest.approx({Size.of(10, 100): 120})
    assert timed == [10]


def test_small_sizes_are_timed_and_the_smallest_always_measured() -> None:
    overhead = plan_sizes(SIZES, [1], seconds=1000, time_pair=lambda size: 1.0)
    assert not overhead.left_out  # in proportion to tokens, the largest would need 400 s
    assert sum(each[1] for each in overhead.seconds.values()) == pytest.approx(1000)
    assert list(plan_sizes(SIZES, [1], seconds=1, time_pair=lambda size: 5.0).seconds) == [SIZES[0]]
