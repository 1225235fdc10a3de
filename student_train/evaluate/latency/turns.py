"""Models that take turns on one machine: the clock, and the machine as it is named in a record.

What the machine does besides hits all models alike when they run one after the other, again and again. Nothing here
knows what is run.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from student_train.evaluate.latency.schedule import LEAST_RUNS

ResultT = TypeVar("ResultT")
Pass = Callable[[], object]
"""What is timed, on inputs that are ready; it returns when the result is."""
_MOST_WARM_UP_RUNS = 5


class Show(Protocol):
    """Called with what is being done, for a progress line."""

    def __call__(self, doing: str, /) -> None: ...


def now() -> float:
    """Seconds of a clock that only goes forward."""
    return time.perf_counter()


def time_once(call: Pass) -> float:
    """Seconds that a call takes."""
    started = now()
    call()
    return now() - started


def time_pair(passes: Iterable[Pass]) -> float:
    """Seconds of one pass of each model: the best of three, since a first guess should not pay for a moment's noise."""
    seconds = 0.0
    for call in passes:
        call()
        seconds += min(time_once(call) for _ in range(3))
    return seconds


def take_turns(passes: Sequence[Pass], runs: int, seconds: float) -> list[list[float]]:
    """Seconds of each run of each pass; see `alternate`."""
    return alternate([partial(time_once, call) for call in passes], runs, seconds)


def alternate(calls: Sequence[Callable[[], ResultT]], runs: int, seconds: float) -> list[list[ResultT]]:
    """What each call returns, the calls in turn after a warm-up: at most `runs`, and no more than fit in `seconds`."""
    started = now()
    for warm_up in range(_MOST_WARM_UP_RUNS):
        if warm_up and now() - started > seconds / 10:
            break
        for call in calls:
            call()
    results: list[list[ResultT]] = [[] for _ in calls]
    done = 0
    while done < runs and (done < LEAST_RUNS or now() - started < seconds):
        for call, returned in zip(calls, results, strict=True):
            returned.append(call())
        done += 1
    return results


@contextmanager
def threads_restored() -> Iterator[None]:
    """Around what sets the number of threads of PyTorch."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def name_hardware(devices: Sequence[str]) -> dict[str, str]:
    """Processor, and GPU where that is one of the devices."""
    hardware = {"cpu": _processor()}
    if "cuda" in devices:
        hardware["cuda"] = torch.cuda.get_device_name()
    return hardware


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
