"""Rows -> the coded arrays of one block: one teacher pass per view, each batch coded as soon as it is there.

A block is computed from its rows alone, in batches that start at its first row, so that it comes out the same whichever
process computes it, and whether the build ran through or was killed and started again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from teacher_cache.device import side_stream
from teacher_cache.format.layout import NEXT_KEPT, SEGMENT_STARTS, StoreLayout
from teacher_cache.format.row_bits import pack_row_bits
from teacher_cache.teacher.teacher import Teacher

_PASSES_WAITING = 2
"""Passes whose outputs exist at a time beside the one that is running."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ComputedBlock:
    """The arrays of a block whose passes the teacher has been given; they may still be coded in another thread."""

    targets: BlockTargets
    passes: tuple[Future[None], ...]

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """Every array of the block, once the last of its passes is coded. Call once.

        Raises:
            TeacherError: a pass could not be coded, or there is no room for all that has to be kept.
        """
        for one in self.passes:
            one.result()
        return self.targets.finish()


@torch.inference_mode()
def compute_block(
    layout: StoreLayout,
    teacher: Teacher,
    quantisers: Mapping[str, Quantiser],
    rows: RowBlock,
    batch_rows: int,
    overlap: Overlap | None = None,
) -> ComputedBlock:
    """Everything that the store keeps of one block of rows.

    An `overlap` goes on with it while the teacher reads the next block; without one all of it is coded.
    """
    if overlap is None:
        with Overlap(teacher.device) as own:
            return compute_block(layout, teacher, quantisers, rows, batch_rows, own)
    block, manifest = BlockTargets(layout, quantisers), layout.manifest
    block.put_rows("input_ids", rows.input_ids_BT)
    block.put_rows("length", rows.length_B)
    block.put_rows("row_id", rows.row_id_B)
    block.put_rows("document", rows.document_B)
    if rows.starts_BT is not None:
        block.put_rows(SEGMENT_STARTS, pack_row_bits(rows.starts_BT))
    views = run_views(manifest, teacher, layout.streams, rows, batch_rows, manifest.targets.views())
    passes = tuple(overlap.submit(partial(_put_pass, block, teacher, one, rows.row_id_B)) for one in views)
    return ComputedBlock(targets=block, passes=passes)


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
    """Does work beside the teacher, in the order in which it is given; when the context is left, all of it is done.

    `threaded`: in a thread of its own, or at once. By default in a thread where that pays, on a GPU. One is made for a
    build: between two blocks nothing is waited for.
    """

    def __init__(self, device: torch.device, *, threaded: bool | None = None) -> None:
        cuda = device.type == "cuda"
        threaded = cuda if threaded is None else threaded
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coder") if threaded else None
        self._device = device
        self._stream = side_stream(device, "coder") if cuda else None
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

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Do `work` on what the current stream has been given so far; returns what says that it is done.

        It must end with its results on the host: only then may the memory of what it read be used again.
        """
        if self._pool is None:
            work()
            done = Future[None]()
            done.set_result(None)
            return done
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
        done = self._pool.submit(self._run, work, ready)
        self._waiting.append(done)
        while self._waiting and (len(self._waiting) > _PASSES_WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()
        return done

    @torch.inference_mode()
    def _run(self, work: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            work()
