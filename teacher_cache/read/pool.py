"""Several stores as one corpus: rows and blocks numbered through, in the order in which the stores are given.

In: the stores' locations, globs among them. Out: a `CacheReader`, or a `CachePool` of several that is read in the same
way; both are a `CacheSource`. Each block is read and decoded by the store that it lies in, with that store's own
constants, so calibrations and block sizes may differ. Stores that a student could not learn from together, and stores
that hold the same rows twice, are refused. Cost: opening every store once. Nothing is copied and nothing is written.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cached_property
from glob import glob, has_magic
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.nmse import Transform
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest, concatenate
from teacher_cache.contract.manifest import Manifest, sha256_of_json
from teacher_cache.contract.targets import View
from teacher_cache.errors import StoreError
from teacher_cache.read.decode import CodedBlock
from teacher_cache.read.merge import merge_parts
from teacher_cache.read.missing import check_request, check_rotated
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local_cache import open_local_cache
from teacher_cache.wording import some

_log = logging.getLogger(__name__)
REMOTE = "://"


class CacheSource(Protocol):
    """What training and evaluation read: one store (`CacheReader`, which says what each member is), or several."""

    @property
    def path(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def rows(self) -> int: ...

    @property
    def block_bounds(self) -> NDArray[np.int64]: ...

    @property
    def identity_sha256(self) -> str: ...

    def require(self, request: TargetRequest) -> None: ...

    def views_for(self, request: TargetRequest) -> tuple[View, ...]: ...

    def shards_read(self, request: TargetRequest) -> tuple[int, int]: ...

    def hidden_variance(self, layer: int) -> float: ...

    def teacher_folder(self) -> Path: ...

    def load_block(
        self, block: int, request: TargetRequest, view: View, masked_view: int = 0, threads: Executor | None = None
    ) -> CodedBlock: ...

    def decode(self, coded: CodedBlock, start: int, stop: int, device: str | torch.device = "cpu") -> TargetBatch: ...

    def rotation(self, layer: int) -> Transform | None: ...

    def read_rows(
        self,
        start: int,
        stop: int,
        request: TargetRequest,
        *,
        masked_view: int = 0,
        device: str | torch.device = "cpu",
    ) -> Batch: ...


def open_caches(
    locations: str | Path | Sequence[str | Path], *, local_cache: str | None = None, local_cache_gib: float = 50.0
) -> CacheReader | CachePool:
    """Open one store, or several to read as one: paths, globs of local paths, or addresses such as `s3://bucket/name`.

    `read_rows` of what is returned gives decoded rows, `manifest` says what there is, `rows` how many. What is read of
    remote stores is kept in the folder `local_cache`, where one is named, up to `local_cache_gib`.

    Raises:
        StoreError: one of them cannot be opened, a glob matches nothing, they do not go together, or there can be no
            such folder.
    """
    copies = open_local_cache(local_cache, gib=local_cache_gib)
    readers = [
        CacheReader.open(location, copies=copies if REMOTE in location else None)
        for location in expand_locations(_as_texts(locations))
    ]
    for reader in readers:
        _log.info("opened store %s: %d rows", reader.path, reader.rows)
    return readers[0] if len(readers) == 1 else CachePool(readers)


def _as_texts(locations: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return (str(locations),) if isinstance(locations, str | Path) else tuple(map(str, locations))


def expand_locations(locations: Sequence[str]) -> tuple[str, ...]:
    """Every location by itself: what a glob of local paths matches, sorted by name; all others as they are.

    Raises:
        StoreError: a glob matches nothing, or there is no location at all.
    """
    found: list[str] = []
    for location in locations:
        # a folder may have brackets in its own name
        if REMOTE in location or not has_magic(location) or Path(location).exists():
            found.append(location)
            continue
        pattern = str(Path(location).expanduser())
        matches = sorted(glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute patterns
        if not matches:
            raise StoreError(
                f"{location!r} matches nothing: there is no store to read; give the path of a store that "
                "`kdcache build` wrote, or a pattern in quotes that matches some"
            )
        found += matches
    if not found:
        raise StoreError("no store is given, so there is nothing to read; give the path of at least one")
    return tuple(found)


def parts_of(source: CacheSource) -> tuple[CacheSource, ...]:
    """The stores that a source reads, in order."""
    return source.parts if isinstance(source, CachePool) else (source,)


class CachePool:
    """Several matching stores, for reading as one. Rows and blocks are those of all parts, one after another.

    `manifest` is the first part's, with the rows of all and a corpus record of all texts; its blocks are not those of
    the pool, which `block_bounds` gives.
    """

    def __init__(self, readers: Sequence[CacheReader]) -> None:
        """Put stores together.

        Raises:
            StoreError: they differ in what a student sees of them, or hold the same rows.
        """
        self.manifest = merge_parts([(reader.path, reader.manifest) for reader in readers])
        self.parts: tuple[CacheReader, ...] = tuple(readers)
        self.path = some([reader.path for reader in self.parts], 3)
        self._first_blocks = [0, *accumulate(len(part.block_bounds) - 1 for part in self.parts)]
        self._rotations: dict[int, Transform | None] = {}
        self._first_rows = [0, *accumulate(part.rows for part in self.parts)]

    @property
    def rows(self) -> int:
        """Number of rows in all parts."""
        return self._first_rows[-1]

    @cached_property
    def block_bounds(self) -> NDArray[np.int64]:
        """First row of each block of all parts, and the number of rows after the last of them."""
        starts = [part.block_bounds[:-1] + first for part, first in zip(self.parts, self._first_rows, strict=False)]
        return np.concatenate([*starts, np.asarray([self.rows])])

    @cached_property
    def identity_sha256(self) -> str:
        """Hash of the parts' hashes, in order: other parts, or another order, number the rows differently."""
        return sha256_of_json([part.identity_sha256 for part in self.parts])

    def require(self, request: TargetRequest) -> None:
        """Check that the parts hold what is asked for; all of them hold the same targets.

        Raises:
            TargetsError: they do not.
        """
        check_request(request, self.manifest, self.path, several=True)
        check_rotated(request, self.rotation, self.path)

    def views_for(self, request: TargetRequest) -> tuple[View, ...]:
        """The views that hold the targets asked for."""
        return self.parts[0].views_for(request)

    def shards_read(self, request: TargetRequest) -> tuple[int, int]:
        """Objects that one pass over all rows reads for a request, and their bytes."""
        objects, sizes = zip(*(part.shards_read(request) for part in self.parts), strict=True)
        return sum(objects), sum(sizes)

    def hidden_variance(self, layer: int) -> float:
        """E||h - mean||^2 of hidden state `layer` around the mean of each part, averaged over all rows."""
        return sum(part.rows * part.hidden_variance(layer) for part in self.parts) / self.rows

    def teacher_folder(self) -> Path:
        """A Hugging Face folder with the teacher, which is the same in every part."""
        return self.parts[0].teacher_folder()

    def load_block(
        self, block: int, request: TargetRequest, view: View, masked_view: int = 0, threads: Executor | None = None
    ) -> CodedBlock:
        """Read, check and decompress what `request` needs of one block of the pool in one view. Thread-safe.

        Raises:
            StoreError: a shard is missing or not what was committed.
        """
        part, own_block = self._find(block)
        return replace(part.load_block(own_block, request, view, masked_view, threads), block=block)

    def decode(self, coded: CodedBlock, start: int, stop: int, device: str | torch.device = "cpu") -> TargetBatch:
        """Rows start..stop of a block of the pool, counted from its first row, as tensors on `device`."""
        # coordinates of one part would mean nothing in another
        assert all(self.rotation(layer) is not None for layer in coded.request.rotated_layers)
        part, own_block = self._find(coded.block)
        return part.decode(replace(coded, block=own_block), start, stop, device)

    def rotation(self, layer: int) -> Transform | None:
        """What takes rotated coordinates of hidden state `layer` back, if all parts share it; None if they do not."""
        if layer not in self._rotations:
            first, *rest = (part.rotation(layer) for part in self.parts)
            self._rotations[layer] = first if all(_same_coordinates(first, other) for other in rest) else None
        return self._rotations[layer]

    def read_rows(
        self,
        start: int,
        stop: int,
        request: TargetRequest,
        *,
        masked_view: int = 0,
        device: str | torch.device = "cpu",
    ) -> Batch:
        """Rows start..stop of the pool, in every view that the request needs.

        Raises:
            StoreError: a shard is missing or damaged.
            TargetsError: the parts do not hold what is asked for.
        """
        self.require(request)
        if not 0 <= start < stop <= self.rows:
            raise ValueError(f"rows {start}..{stop} are not within 0..{self.rows}")
        pieces = []
        for part, (first, last) in zip(self.parts, pairwise(self._first_rows), strict=True):
            own_start, own_stop = max(start, first) - first, min(stop, last) - first
            if own_start < own_stop:
                pieces.append(part.read_rows(own_start, own_stop, request, masked_view=masked_view, device=device))
        return {view: concatenate([piece[view] for piece in pieces]) for view in pieces[0]}

    def _find(self, block: int) -> tuple[CacheReader, int]:
        """The part that holds a block of the pool, and the block's number there."""
        place = bisect_right(self._first_blocks, block) - 1
        return self.parts[place], block - self._first_blocks[place]


def _same_coordinates(one: Transform | None, other: Transform | None) -> bool:
    if one is None or other is None:
        return one is other
    # steps may differ: coordinates are codes times step
    return torch.equal(one.basis_DK, other.basis_DK) and torch.equal(one.mean_D, other.mean_D)
