"""`map` with a few threads and bounded memory: many small reads, hashing, and blocks on their way to the disk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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


def writer_threads(most: int = 4) -> int:
    """Threads that code and write blocks beside a teacher, or beside each other: a quarter of the cores."""
    return max(1, min(most, (os.cpu_count() or 1) // 4))
