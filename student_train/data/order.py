"""The order of training rows as pure arithmetic: which pieces of which blocks make up each batch of each rank.

Rows of epoch after epoch form one endless stream; a place in it is one integer. Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, groupby

import numpy as np
from numpy.typing import NDArray

from student_train.data.split import RowRanges, block_pieces, count_rows
from teacher_cache.random_bits import uniform_bits


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows start..stop of a block, counted from the block's first row, read in one epoch."""

    epoch: int
    block: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class RowOrder:
    """The endless stream of some rows of a cache, block by block, in a new order each epoch (seed None: as stored).

    `bounds` is the first row of each block, and the number of all rows.
    """

    rows: RowRanges
    bounds: NDArray[np.int64]
    seed: int | None

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """The pieces of blocks that rows start..stop of the stream lie in, in the order of the stream."""
        rows = count_rows(self.rows)
        while start < stop:
            epoch, offset = divmod(start, rows)
            pieces, ends = _epoch_pieces(self, epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            block, _, piece_stop = pieces[place].tolist()
            first = piece_stop - (int(ends[place]) - offset)
            last = min(first + stop - start, piece_stop)
            block_start = int(self.bounds[block])
            yield Segment(epoch=epoch, block=block, start=first - block_start, stop=last - block_start)
            start += last - first


@lru_cache(maxsize=8)
def _epoch_pieces(order: RowOrder, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pieces of an epoch in order (`block_pieces`), and the rows of the epoch up to the end of each."""
    pieces = block_pieces(order.bounds, order.rows)
    if order.seed is not None:
        pieces = pieces[np.argsort(uniform_bits(order.seed, epoch, pieces[:, 0]), kind="stable")]
    return pieces, np.cumsum(pieces[:, 2] - pieces[:, 1])


@dataclass(frozen=True, kw_only=True)
class ReadingPlan:
    """Which pieces of which blocks make up the batches of one rank."""

    order: RowOrder
    batch_size: int
    rank: int
    world_size: int
    position: int
    stop: int | None

    def batches(self) -> Iterator[tuple[int, int, list[Segment]]]:
        """Of each global batch its place in the stream, how many rows it has, and this rank's pieces of it."""
        for first in count(self.position, self.batch_size):
            rows = self.batch_size if self.stop is None else min(self.batch_size, self.stop - first)
            if rows <= 0:
                return
            start, stop = (first + rows * rank // self.world_size for rank in (self.rank, self.rank + 1))
            yield first, rows, list(self.order.segments(start, stop))

    def visits(self) -> Iterator[tuple[int, int]]:
        """(epoch, block) in the order in which `batches` first needs them: a block stays while batches cross it."""
        needed = ((part.epoch, part.block) for _, _, segments in self.batches() for part in segments)
        return (visit for visit, _ in groupby(needed))
