"""Latency: what is timed in a given time, turn by turn, and exports that compute what PyTorch computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from student_train.evaluate.latency import latency
from student_train.evaluate.latency.latency import take_turns
from student_train.evaluate.latency.schedule import LEAST_RUNS


def test_models_take_turns() -> None:
    calls = []
    student, teacher = take_turns([lambda: calls.append("s"), lambda: calls.append("t")], runs=7, seconds=60)
    assert len(student) == len(teacher) == 7
    assert calls == ["s", "t"] * (len(calls) // 2)
    assert len(calls) > 2 * 7  # the warm-up is not among the times


def test_runs_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves with the passes alone; a tenth of the time is for warming up."""
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 0.5

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now))
    [slow] = take_turns([run], runs=1000, seconds=10)
    assert slow == [0.5] * 17
    assert take_turns([run], runs=1000, seconds=0.001) == [[0.5] * LEAST_RUNS]
