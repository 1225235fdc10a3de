"""Threads for what does not need the interpreter: many small reads, hashing, blocks to and from the disk; how many."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

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
    pool = ThreadPoolExecutor(threads, thread_name_prefix="in-threads")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            while waiting and (waiting[0].done() or len(waiting) > most):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # where one has failed or nobody wants more, what is under way is waited for, and nothing else begun
        pool.shutdown(cancel_futures=True)


class ReadingThreads(Executor):
    """An executor that nothing has to wait for: its threads end with the process, or once it is shut down or forgotten.

    For work that only reads, such as from storage that may take minutes to come back. What is under way goes on then,
    what is not is cancelled.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tasks = _Tasks()
        # they are given everything but the executor itself, which could not be forgotten otherwise
        self._threads = [
            threading.Thread(target=self._tasks.serve, name=name, daemon=True) for _ in range(max(1, threads))
        ]
        self._end = weakref.finalize(self, self._tasks.end, len(self._threads))
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` in one of the threads, after all that was submitted before."""
        future = Future[Any]()
        self._tasks.put(future, partial(fn, *args, **kwargs))
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Cancel what has not begun, and do not wait for what has: `join` does."""
        self._end()

    def join(self, seconds: float) -> None:
        """Wait for the threads to end, at most so long altogether."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


class _Tasks:
    """Calls on their way to threads, and whether any are still to be made."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._over = False

    def put(self, future: Future[Any], call: Callable[[], Any]) -> None:
        with self._lock:
            if self._over:
                future.cancel()
            else:
                self._queue.put((future, call))

    def end(self, threads: int) -> None:
        with self._lock:
            self._over = True
            for _ in range(threads):
                self._queue.put(None)

    def serve(self) -> None:
        while (task := self._queue.get()) is not None:
            future, call = task
            if self._over:
                future.cancel()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it
                    future.set_exception(error)
            # or a thread that waits for the next one would keep what this one has read
            del task, future, call


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
