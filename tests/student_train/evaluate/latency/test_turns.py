"""Turns: what is timed in a given time, one model after the other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from student_train.evaluate.latency import turns
from student_train.evaluate.latency.schedule import LEAST_RUNS
from student_train.evaluate.latency.turns import alternate, name_hardware, take_turns, threads_restored


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

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: now))
    [slow] = take_turns([run], runs=1000, seconds=10)
    assert slow == [0.5] * 17
    assert take_turns([run], runs=1000, seconds=0.001) == [[0.5] * LEAST_RUNS]


def test_calls_hand_over_what_they_return() -> None:
    numbers = iter(range(100))
    first, second = alternate([lambda: next(numbers), lambda: "b"], runs=3, seconds=60)
    assert first == [first[0], first[0] + 1, first[0] + 2] and second == ["b"] * 3


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    with threads_restored():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before
    assert list(name_hardware(["cpu"])) == ["cpu"] and name_hardware(["cpu"])["cpu"]
