"""`map` with a few threads: the order of the items, a bound on what waits, errors where they belong."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.threads import ReadingThreads, cores_beside, in_threads, usable_cores


@given(delays=st.lists(st.integers(0, 2), max_size=20), threads=st.integers(1, 4), ahead=st.none() | st.integers(0, 5))
def test_results_come_in_the_order_of_the_items(delays: list[int], threads: int, ahead: int | None) -> None:
    """Whichever is ready first."""

    def work(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 1000)
        return item[0]

    found = list(in_threads(work, enumerate(delays), threads=threads, ahead=ahead))
    assert found == list(range(len(delays)))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_only_so_many_items_are_taken_ahead_of_their_results(ahead: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number

    for given_back, _ in enumerate(in_threads(lambda number: number, items(), threads=2, ahead=ahead)):
        assert taken - given_back <= ahead + 1


def test_items_are_read_by_the_thread_that_asks_and_worked_on_by_others() -> None:
    def items() -> Iterator[threading.Thread]:
        for _ in range(4):
            yield threading.current_thread()

    for reader, worker in in_threads(lambda reader: (reader, threading.current_thread()), items()):
        assert reader is threading.main_thread()
        assert worker is not reader


def test_an_error_comes_in_its_place() -> None:
    results = in_threads(lambda number: 12 // number, [1, 2, 0, 3], threads=3)
    assert [next(results), next(results)] == [12, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_error_of_the_items_comes_out_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(in_threads(lambda number: number, items()))


def test_once_it_is_closed_nothing_is_under_way() -> None:
    under_way = threading.Semaphore(0)

    def work(number: int) -> int:
        time.sleep(0.01)
        under_way.release()
        return number

    results = in_threads(work, range(1000), threads=2, ahead=2)
    assert next(results) == 0
    results.close()
    done = 0
    while under_way.acquire(blocking=False):
        done += 1
    assert done <= 4
    time.sleep(0.03)
    assert not under_way.acquire(blocking=False)


@pytest.mark.parametrize("cores, here, on_cpu, on_gpu", [(1, 1, 1, 1), (2, 1, 1, 1), (8, 1, 2, 6), (64, 8, 2, 6)])
def test_writers_take_what_a_teacher_and_other_processes_leave(
    monkeypatch: pytest.MonkeyPatch, cores: int, here: int, on_cpu: int, on_gpu: int
) -> None:
    """`here` processes share the cores that this one may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert usable_cores() == cores // here
    assert [cores_beside(torch.device(name)) for name in ("cpu", "cuda")] == [on_cpu, on_gpu]


def test_what_is_read_comes_back_and_errors_too() -> None:
    threads = ReadingThreads(2, "reading")
    assert list(threads.map(lambda number: 2 * number, range(20))) == list(range(0, 40, 2))
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result()
    threads.shutdown()
    threads.join(5)
    assert not any(thread.is_alive() for thread in threads._threads)


def test_what_has_not_begun_when_threads_are_shut_down_is_cancelled_and_nobody_waits_for_it() -> None:
    """Also for one of the threads that waits for others: blocks wait for their arrays."""
    started, go_on = threading.Event(), threading.Event()
    arrays, blocks = ReadingThreads(1, "arrays"), ReadingThreads(1, "blocks")

    def array() -> None:
        started.set()
        go_on.wait(10)

    block = blocks.submit(lambda: [one.result() for one in (arrays.submit(array), arrays.submit(array))])
    assert started.wait(10)
    for threads in (arrays, blocks):
        threads.shutdown()
    late = arrays.submit(array)
    go_on.set()
    with pytest.raises(CancelledError):
        block.result(timeout=10)
    with pytest.raises(CancelledError):
        late.result(timeout=10)


def test_reading_threads_end_when_they_are_forgotten() -> None:
    threads = ReadingThreads(2, "reading")
    alive = list(threads._threads)
    del threads
    gc.collect()
    for thread in alive:
        thread.join(10)
        assert not thread.is_alive()
