"""Coding beside the teacher gives the block that coding after it gives, and its errors are not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from teacher_cache.build.block import Overlap, compute_block
from teacher_cache.build.build import build_cache
from teacher_cache.build.encode import BlockTargets
from teacher_cache.build.inputs import Silent, choose_batch_rows, read_inputs
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import TeacherError
from teacher_cache.format.layout import StoreLayout

Settings = Callable[..., BuildSettings]
CPU = torch.device("cpu")


def test_a_block_is_the_same_whichever_thread_codes_it(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "never-written.zarr", views=2)
    teacher, _, rows, manifest = read_inputs(settings, Silent())
    teacher.start()
    batch_rows = choose_batch_rows(settings, teacher, manifest.seq_len)
    blocks = [
        compute_block(
            StoreLayout.of(manifest), teacher, {}, rows.read(0, 16), batch_rows, Overlap(CPU, threaded=threaded)
        ).finish()
        for threaded in (False, True)
    ]
    assert blocks[0].keys() == blocks[1].keys()
    for path, values in blocks[0].items():
        assert np.array_equal(values, blocks[1][path]), path


def test_the_next_block_is_computed_while_one_is_still_to_be_coded(small_settings: Settings, tmp_path: Path) -> None:
    """Between blocks nothing is waited for: the coder is held until both have been through the teacher."""
    settings = small_settings(tmp_path / "never-written.zarr", targets="hidden")
    teacher, _, rows, manifest = read_inputs(settings, Silent())
    teacher.start()
    layout, parts = StoreLayout.of(manifest), [rows.read(0, 16), rows.read(16, 32)]
    alone = [compute_block(layout, teacher, {}, part, 16).finish() for part in parts]
    go_on = threading.Event()
    with Overlap(CPU, threaded=True) as coder:
        coder.submit(go_on.wait)  # type: ignore[arg-type]
        blocks = [compute_block(layout, teacher, {}, parts[0], 16, coder)]
        assert not blocks[0].passes[-1].done()
        threading.Timer(0.1, go_on.set).start()
        blocks.append(compute_block(layout, teacher, {}, parts[1], 16, coder))
        together = [block.finish() for block in blocks]
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(values, other[path]) for path, values in one.items())


def test_a_build_has_one_coder_and_writes_the_same_bytes_beside_the_teacher(
    small_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of two views in an `nmse` precision, coded at once and in a thread."""
    made: list[bool] = []

    class Coder(Overlap):
        def __init__(self, device: torch.device) -> None:
            made.append(threaded)
            super().__init__(device, threaded=threaded)

    monkeypatch.setattr("teacher_cache.build.build.Overlap", Coder)
    written = []
    for threaded in (False, True):
        out = tmp_path / f"{threaded}.zarr"
        build_cache(small_settings(out, precision="nmse:1e-1", views=2))
        written.append((out / "commits.sha256").read_bytes())
    assert made == [False, True]
    assert written[0] == written[1]


def test_a_block_with_a_pass_that_could_not_be_coded_is_not_finished(
    small_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(tmp_path / "never-written.zarr", targets="hidden")
    teacher, _, rows, manifest = read_inputs(settings, Silent())
    teacher.start()

    def fail(*_: object) -> None:
        raise TeacherError("no room")

    monkeypatch.setattr(BlockTargets, "put_vectors", fail)
    with pytest.raises(TeacherError, match="no room"), Overlap(CPU, threaded=True) as coder:
        compute_block(StoreLayout.of(manifest), teacher, {}, rows.read(0, 16), 16, coder).finish()


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


def test_a_block_holds_its_rows_and_masks_and_nothing_at_padding(small_settings: Settings, tmp_path: Path) -> None:
    """The last block of a store is short: the places of rows that do not exist stay zeros."""
    settings = small_settings(tmp_path / "never-written.zarr", views=2, rows="document")
    teacher, _, rows, manifest = read_inputs(settings, Silent())
    teacher.start()
    block = rows.read(32, 40)
    arrays = compute_block(StoreLayout.of(manifest), teacher, {}, block, 3).finish()
    for path, values in (("input_ids", block.input_ids_BT), ("length", block.length_B),
                         ("row_id", block.row_id_B), ("document", block.document_B)):  # fmt: skip
        assert np.array_equal(arrays[path][:8], values) and not arrays[path][8:].any(), path
    count_WR = arrays["masked/count"].reshape(2, 16)
    assert (count_WR[:, :8] > 0).all() and not count_WR[:, 8:].any()
    codes_DRT = arrays["hidden/4/codes"].reshape(32, 16, 24)
    real_RT = np.zeros((16, 24), dtype=bool)
    real_RT[:8] = np.arange(24) < block.length_B[:, None]
    assert codes_DRT[:, real_RT].any() and not codes_DRT[:, ~real_RT].any()


def test_a_batch_of_any_size_gives_the_same_block(small_settings: Settings, tmp_path: Path) -> None:
    """But for what arithmetic in another shape of batch changes; whole numbers agree exactly."""
    settings = small_settings(tmp_path / "never-written.zarr", targets="logits,hidden", layers="4")
    teacher, _, rows, manifest = read_inputs(settings, Silent())
    teacher.start()
    one, many = (
        compute_block(StoreLayout.of(manifest), teacher, {}, rows.read(0, 16), size).finish() for size in (1, 16)
    )
    for path, values in one.items():
        if np.issubdtype(values.dtype, np.floating):
            assert np.allclose(values.astype(float), many[path].astype(float), atol=1e-2, rtol=1e-2), path
        elif not path.startswith("logits/"):
            assert np.array_equal(values, many[path]), path


def test_after_an_error_nothing_that_waits_is_begun() -> None:
    begun: list[int] = []
    go_on = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        go_on.wait()

    def fail(coder: Overlap) -> None:
        for number in range(2):
            coder.submit(partial(work, number))
        threading.Timer(0.1, go_on.set).start()
        raise KeyError

    with pytest.raises(KeyError), Overlap(CPU, threaded=True) as coder:
        fail(coder)
    assert begun == [0]
