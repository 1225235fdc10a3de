"""A cache by its path or open already, and which of its rows are for training and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from student_train.data.split import RowRanges, held_out_rows, share_out, split_rows
from teacher_cache.read.pool import CacheSource, open_caches, parts_of

Cache = str | Path | Sequence[str | Path] | CacheSource
"""A store, or several to read as one: paths, globs, addresses, or what `open_caches` gave."""


def open_source(cache: Cache, *, local_cache: str | None = None, local_cache_gib: float = 50.0) -> CacheSource:
    """The cache, opened if it is given by where it lies.

    Raises:
        StoreError: it cannot be opened, see `open_caches`.
    """
    if isinstance(cache, str | Path | Sequence):
        return open_caches(cache, local_cache=local_cache, local_cache_gib=local_cache_gib)
    return cache


def split_source(source: CacheSource, valid_share: float) -> tuple[RowRanges, RowRanges]:
    """The rows to train on and the rows held out, as `kdtrain --valid-share` takes them.

    Raises:
        SettingsError: no row would be left for training.
    """
    part_rows = [part.rows for part in parts_of(source)]
    held_out = held_out_rows(source.rows, valid_share)
    return split_rows(part_rows, share_out(held_out, part_rows))
