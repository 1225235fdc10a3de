"""A cache as a student of fewer ids reads it, and how often the rows of a cache have each id.

Counting reads the input ids of all rows, and nothing else: about a byte per token.
"""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from student_train.data.split import RowRanges, block_pieces
from student_train.students.vocabulary.kept_ids import KeptIds
from student_train.students.vocabulary.mapping import IdMapping
from teacher_cache.codecs.nmse import Transform
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import View
from teacher_cache.errors import DamagedStoreError
from teacher_cache.read.decode import CodedBlock
from teacher_cache.read.pool import CacheSource


class TrimmedSource:
    """A cache as a student of fewer ids reads it: a `CacheSource` whose batches are in the student's ids.

    The manifest is the cache's own, with the teacher's number of ids.
    """

    def __init__(self, source: CacheSource, kept: KeptIds) -> None:
        self._source, self._mapping = source, IdMapping(kept)

    @property
    def path(self) -> str:
        """Where the cache lies."""
        return self._source.path

    @property
    def manifest(self) -> Manifest:
        """What the cache holds."""
        return self._source.manifest

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._source.rows

    @property
    def block_bounds(self) -> NDArray[np.int64]:
        """First row of each block, and the number of rows."""
        return self._source.block_bounds

    @property
    def identity_sha256(self) -> str:
        """Hash of the cache's contents."""
        return self._source.identity_sha256

    def require(self, request: TargetRequest) -> None:
        """Check that the cache holds what is asked for.

        Raises:
            TargetsError: it does not.
        """
        self._source.require(request)

    def views_for(self, request: TargetRequest) -> tuple[View, ...]:
        """The views that hold the targets asked for."""
        return self._source.views_for(request)

    def shards_read(self, request: TargetRequest) -> tuple[int, int]:
        """Objects that one pass over all rows reads for a request, and their bytes."""
        return self._source.shards_read(request)

    def hidden_variance(self, layer: int) -> float:
        """E||h - mean||^2 of hidden state `layer`."""
        return self._source.hidden_variance(layer)

    def teacher_folder(self) -> Path:
        """The teacher, with all of its ids."""
        return self._source.teacher_folder()

    def load_block(
        self, block: int, request: TargetRequest, view: View, masked_view: int = 0, threads: Executor | None = None
    ) -> CodedBlock:
        """Read, check and decompress what `request` needs of one block in one view. Thread-safe.

        Raises:
            StoreError: a shard is missing or not what was committed.
        """
        return self._source.load_block(block, request, view, masked_view, threads)

    def decode(self, coded: CodedBlock, start: int, stop: int, device: str | torch.device = "cpu") -> TargetBatch:
        """Rows start..stop of a block, counted from its first row, in the student's ids."""
        return self._mapping.batch(self._source.decode(coded, start, stop, device))

    def rotation(self, layer: int) -> Transform | None:
        """What takes rotated coordinates of hidden state `layer` back."""
        return self._source.rotation(layer)

    def read_rows(
        self,
        start: int,
        stop: int,
        request: TargetRequest,
        *,
        masked_view: int = 0,
        device: str | torch.device = "cpu",
    ) -> Batch:
        """Rows start..stop in the student's ids, in every view that the request needs.

        Raises:
            StoreError: a shard is missing or damaged.
            TargetsError: the cache does not hold what is asked for.
        """
        batch = self._source.read_rows(start, stop, request, masked_view=masked_view, device=device)
        return {view: self._mapping.batch(targets) for view, targets in batch.items()}


def count_ids(source: CacheSource, rows: RowRanges, *, skip_damaged: bool = False) -> NDArray[np.int64]:
    """How often the rows have each of the teacher's ids [V], before any is masked; padding is left out.

    Raises:
        StoreError: a block cannot be read; a damaged one is passed over with `skip_damaged`.
    """
    request, entries = TargetRequest(), source.manifest.teacher.vocab_size
    view = source.views_for(request)[0]
    counts_V = np.zeros(entries, dtype=np.int64)
    for block, start, stop in block_pieces(source.block_bounds, rows).tolist():
        try:
            coded = source.load_block(block, request, view)
        except DamagedStoreError:
            if not skip_damaged:
                raise
            continue
        here = slice(start - int(source.block_bounds[block]), stop - int(source.block_bounds[block]))
        ids_BT, length_B = coded.on_host("input_ids")[here], coded.on_host("length")[here]
        real_BT = np.arange(ids_BT.shape[1]) < length_B[:, None]
        counts_V += np.bincount(ids_BT[real_BT].astype(np.int64), minlength=entries)
    return counts_V
