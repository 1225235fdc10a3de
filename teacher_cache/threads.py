"""`map` with a few threads and bounded memory: many small reads, hashing, and blocks on their way to the disk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_THREADS = min(4, max(2, os.cpu_count() or 1))
_WAITING_PER_THREAD = 16
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    threads: int = _THREADS,
    ahead: int | None = None,
) -> Generator[_Result]:
    """`map` with a few threads: results in the order of the items, each as soon as it and those before it are there.

    At most `ahead` items (by default many for each thread) have been taken from `items` and not given back as results;
    `items` is read by the caller's thread.
    """
    most = threads * _WAITING_PER_THREAD if ahead is None else ahead
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="in-threads") as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            while waiting and (waiting[0].done() or len(waiting) > most):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def usable_cores() -> int:
    """Cores that this process may use, shared with those that a launcher has started beside it on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def cores_beside(device: torch.device) -> int:
    """Cores that may code and write beside a teacher on this device.

    On a CPU a quarter, as the teacher takes them all; on a GPU all but the two that launch its kernels and those of
    coding.
    """
    return max(1, usable_cores() // 4 if device.type == "cpu" else usable_cores() - 2)
