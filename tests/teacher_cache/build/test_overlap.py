"""Coding beside the teacher gives what coding after it gives, and its errors are not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from teacher_cache.build.block import Overlap, compute_block
from teacher_cache.build.build import Silent, choose_batch_rows, read_inputs
from teacher_cache.build.settings import BuildSettings
from teacher_cache.format.layout import StoreLayout

Settings = Callable[..., BuildSettings]
CPU = torch.device("cpu")


def test_a_block_is_the_same_whichever_thread_codes_it(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "never-written.zarr", views=2)
    teacher, _, rows, manifest = read_inputs(settings, Silent())
    teacher.start()
    batch_rows, layout = choose_batch_rows(settings, teacher, manifest.seq_len), StoreLayout.of(manifest)
    blocks = [
        compute_block(layout, teacher, {}, rows.read(0, 16), batch_rows, Overlap(CPU, threaded=threaded)).finish()
        for threaded in (False, True)
    ]
    assert blocks[0].keys() == blocks[1].keys()
    for path, values in blocks[0].items():
        assert np.array_equal(values, blocks[1][path]), path


def test_work_keeps_its_order_and_is_done_at_the_end() -> None:
    done: list[int] = []
    with Overlap(CPU, threaded=True) as coder:
        for number in range(20):
            coder.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == list(range(20))


def test_errors_come_out() -> None:
    def fail() -> None:
        raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"), Overlap(CPU, threaded=True) as coder:
        coder.submit(fail)


def test_what_waits_is_bounded() -> None:
    go_on, submitted = threading.Event(), threading.Semaphore(0)

    def submit_many(coder: Overlap) -> None:
        for _ in range(5):
            coder.submit(go_on.wait)  # type: ignore[arg-type]
            submitted.release()

    with Overlap(CPU, threaded=True) as coder:
        thread = threading.Thread(target=submit_many, args=(coder,))
        thread.start()
        try:
            submitted.acquire()
            submitted.acquire()
            assert not submitted.acquire(timeout=0.3), "the third waits for the first"
        finally:
            go_on.set()
            thread.join()
    assert all(submitted.acquire(blocking=False) for _ in range(3))
