"""`map` with a few threads, for many small reads that each wait for a disk or a network, and for hashing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_THREADS = min(4, max(2, os.cpu_count() or 1))
_WAITING_PER_THREAD = 16
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map` with a few threads, which run only a little ahead."""
    rest = iter(items)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="in-threads") as pool:
        waiting: deque[Future[_Result]] = deque()
        waiting.extend(pool.submit(function, item) for item in islice(rest, _THREADS * _WAITING_PER_THREAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
