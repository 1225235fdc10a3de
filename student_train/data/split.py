"""Which rows of a cache are for training and which are held out for validation.

Rows are stored in shuffled order, so the last ones are as good a sample as any, and naming them takes one number: every
run on the same store with the same share holds out the same rows, whatever its seed, and so does every evaluation.
A cache of several stores may hold a different text in each. So each store gives its last rows, as many as its share of
all rows asks for: `share_out` of the one number says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SettingsError

RowRanges = tuple[range, ...]
"""Some rows of a cache: ranges that ascend and do not overlap, none of them empty, each within one store."""


def held_out_rows(rows: int, share: float) -> int:
    """How many of the `rows` rows of a cache are held out: max(1, round(share * rows)).

    Raises:
        SettingsError: no row would be left for training.
    """
    held_out = max(1, round(share * rows))
    if held_out >= rows:
        raise SettingsError(
            f"the cache has {rows!r} rows and --valid-share {share!r} holds out {held_out} of them: no row is left to "
            "train on; build a larger cache or hold out a smaller share"
        )
    return held_out


def share_out(count: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Cut `count`, at most sum(sizes), into whole shares in proportion to `sizes`.

    Each is less than 1 off, and none is above its size.
    """
    ends = [count * size // sum(sizes) for size in accumulate(sizes)]
    return tuple(end - start for start, end in zip([0, *ends[:-1]], ends, strict=True))


def split_rows(part_rows: Sequence[int], held_out: Sequence[int]) -> tuple[RowRanges, RowRanges]:
    """The rows to train on and the rows held out of stores of `part_rows` rows, the last `held_out` of each."""
    training, kept, first = [], [], 0
    for rows, count in zip(part_rows, held_out, strict=True):
        stop = first + rows
        training.append(range(first, stop - count))
        kept.append(range(stop - count, stop))
        first = stop
    return _not_empty(training), _not_empty(kept)


def count_rows(rows: RowRanges) -> int:
    """How many rows these are."""
    return sum(map(len, rows))


def abreast(rows: RowRanges) -> dict[int, int]:
    """The place of each row among all, if the runs go side by side, each at the pace that ends all of them together.

    So the first half of the places holds the first half of every run. In a single run the places follow the rows.
    """
    way = [((place + 0.5) / len(run), row) for run in rows for place, row in enumerate(run)]
    return {row: place for place, (_, row) in enumerate(sorted(way))}


def block_pieces(bounds: NDArray[np.int64], rows: RowRanges) -> NDArray[np.int64]:
    """The pieces of blocks that `rows` lie in, in order, as lines (block, first row, one past its last row).

    `bounds` is the first row of each block, and the number of all rows.
    """
    pieces = []
    for run in rows:
        first, last = np.searchsorted(bounds, (run.start, run.stop - 1), side="right") - 1
        blocks = np.arange(first, last + 1)
        starts, stops = np.maximum(bounds[blocks], run.start), np.minimum(bounds[blocks + 1], run.stop)
        pieces.append(np.stack([blocks, starts, stops], axis=1))
    return np.concatenate(pieces)


def _not_empty(ranges: Sequence[range]) -> RowRanges:
    return tuple(rows for rows in ranges if rows)
