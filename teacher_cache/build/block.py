"""Rows -> the coded arrays of one block: one teacher pass per view, each batch coded as soon as it is there.

A block is computed from its rows alone, in batches that start at its first row, so that it comes out the same whichever
process computes it, and whether the build ran through or was killed and started again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.build.encode import BlockTargets
from teacher_cache.build.passes import TeacherPass, run_views
from teacher_cache.codecs.nmse import Quantiser
from teacher_cache.corpus.corpus import RowBlock
from teacher_cache.corpus.masking import MaskedRows
from teacher_cache.format.layout import NEXT_KEPT, SEGMENT_STARTS, StoreLayout
from teacher_cache.format.row_bits import pack_row_bits
from teacher_cache.teacher.teacher import Teacher

_PASSES_WAITING = 2
"""Passes whose outputs exist at a time beside the one that is running."""


@torch.inference_mode()
def compute_block(
    layout: StoreLayout,
    teacher: Teacher,
    quantisers: Mapping[str, Quantiser],
    rows: RowBlock,
    batch_rows: int,
    overlap: Overlap | None = None,
) -> BlockTargets:
    """Everything that the store keeps of one block of rows, coded and not yet packed."""
    block, manifest = BlockTargets(layout, quantisers), layout.manifest
    block.put_rows("input_ids", rows.input_ids_BT)
    block.put_rows("length", rows.length_B)
    block.put_rows("row_id", rows.row_id_B)
    block.put_rows("document", rows.document_B)
    if rows.starts_BT is not None:
        block.put_rows(SEGMENT_STARTS, pack_row_bits(rows.starts_BT))
    with overlap or Overlap(teacher.device) as coder:
        for one in run_views(manifest, teacher, layout.streams, rows, batch_rows, manifest.targets.views()):
            coder.submit(partial(_put_pass, block, teacher, one, rows.row_id_B))
    return block


def _put_pass(block: BlockTargets, teacher: Teacher, one: TeacherPass, row_id_B: NDArray[np.int64]) -> None:
    block.put_vectors(one)
    if one.masked is not None and one.first == 0:
        _put_mask(block, one.masked, one.masked_view * block.manifest.block_rows)
    if one.kept_BT is not None and one.first == 0:
        block.put_rows(NEXT_KEPT, pack_row_bits(one.kept_BT))
    logits = block.manifest.targets.logits
    if logits is not None and logits.view == one.view:
        _put_logits(block, teacher, one, row_id_B)


def _put_mask(block: BlockTargets, masked: MaskedRows, first: int) -> None:
    block.put_rows("masked/positions", masked.positions_BM, first)
    block.put_rows("masked/original_ids", masked.original_ids_BM, first)
    block.put_rows("masked/replacement_ids", masked.replacement_ids_BM, first)
    block.put_rows("masked/count", masked.count_B, first)


def _put_logits(block: BlockTargets, teacher: Teacher, one: TeacherPass, row_id_B: NDArray[np.int64]) -> None:
    places = one.places()
    assert places is not None
    positions_BM, real_BM = (torch.from_numpy(values) for values in places)
    block.put_logits(
        one.masked_view,
        one.first,
        row_id_B[one.first : one.first + len(real_BM)],
        positions_BM,
        real_BM,
        one.outputs.final_BTD,
        teacher.head(),
    )


class Overlap:
    """Does work beside the teacher; when the context is left, all of it is done.

    `threaded`: in a thread of its own, or at once. By default in a thread where that pays, on a GPU.
    """

    def __init__(self, device: torch.device, *, threaded: bool | None = None) -> None:
        cuda = device.type == "cuda"
        threaded = cuda if threaded is None else threaded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coder") if threaded else None
        self._device = device
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        while self._waiting and kind is None:
            self._waiting.popleft().result()

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` on what the current stream has been given so far.

        It must end with its results on the host: only then may the memory of what it read be used again.
        """
        if self._pool is None:
            work()
            return
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
        self._waiting.append(self._pool.submit(self._run, work, ready))
        while len(self._waiting) > _PASSES_WAITING or self._waiting[0].done():
            self._waiting.popleft().result()
            if not self._waiting:
                return

    @torch.inference_mode()
    def _run(self, work: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            work()
