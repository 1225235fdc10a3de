"""Blocks that are computed -> committed: the loop that builds and imports end in.

    missing blocks -> computed one after another -> the first one tells what all will take -> shards, commit

Compressing, hashing and writing a block happen in background threads, an array to a thread, while the next one is
computed. At most two blocks are being written and one waits, which bounds the memory whatever the number of rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.build.forecast import MeasuredSample, forecast, refuse_without_room
from teacher_cache.build.inputs import BuildProgress
from teacher_cache.build.workers import Workers
from teacher_cache.contract.manifest import Manifest
from teacher_cache.format.protocol import Commit, array_of
from teacher_cache.format.writer import GroupWriter, ShardThreads
from teacher_cache.threads import in_threads

BLOCKS_AT_ONCE = 2
"""Of one the last arrays are written while the next ones are encoded."""


class Computed(Protocol):
    """A block that is computed, or will be."""

    def finish(self) -> dict[str, NDArray[np.generic]]:
        """Every array of it, once they are there. Called once."""


def write_blocks(
    writer: GroupWriter,
    missing: list[int],
    compute: Callable[[int], Computed],
    *,
    workers: Workers,
    progress: BuildProgress,
    force: bool,
    cores: int,
    of_teacher: int = 0,
) -> None:
    """Compute and commit this worker's share of the missing blocks of a group.

    `compute` gives a block by its number, in the caller's thread; `cores` of the machine are free to encode it beside
    that. The first worker's first block says what all of them will take, and what the teacher's copy took where this
    run has written one, `of_teacher` bytes; without `force` nothing is written where there is no room for that.

    Raises:
        SpaceError: there is no room.
    """
    writer.write_metadata()
    tally = _Tally(workers, progress, writer.manifest, missing)
    mine = iter(missing[workers.rank :: workers.count])
    if workers.first and (first := next(mine, None)) is not None:
        started = time.monotonic()
        computed = compute(first)
        shards, sample = _measure(writer, first, computed, started, workers.count)
        found = forecast(writer.group, missing, sample)
        progress.note(found.describe(writer.storage.free_bytes(), of_teacher))
        if not force:
            refuse_without_room(writer.storage, found.total_bytes, begun=len(missing) < writer.manifest.blocks)
        tally.count(writer.write_block(first, shards))
    blocks = ((block, compute(block)) for block in mine)
    with ShardThreads(cores) as threads:
        write = partial(_write_block, writer, threads)
        commits = in_threads(write, blocks, threads=BLOCKS_AT_ONCE, ahead=BLOCKS_AT_ONCE)
        with closing(commits):  # nothing is written any more once this is left, whatever ended it
            for commit in commits:
                tally.count(commit)


def _measure(
    writer: GroupWriter, block: int, computed: Computed, started: float, workers: int
) -> tuple[dict[str, bytes], MeasuredSample]:
    """The shards of the first block by array, and what they say of the others."""
    values = computed.finish()
    coded = time.monotonic()
    shards = {array_of(key): data for key, data in writer.encode_block(block, values)}
    # beside the teacher from now on
    seconds = coded - started + (time.monotonic() - coded) / (os.cpu_count() or 1)
    return shards, MeasuredSample(
        rows=writer.manifest.rows_in([block]),
        blocks=1,
        bytes_per_array={path: len(data) for path, data in shards.items()},
        empty_bytes={},
        seconds=seconds / workers,
    )


class _Tally:
    """Adds up what all workers have committed, and tells the progress."""

    def __init__(self, workers: Workers, progress: BuildProgress, manifest: Manifest, missing: list[int]) -> None:
        self.workers = workers
        self.progress = progress
        self.total = manifest.rows
        self.there = manifest.rows - manifest.rows_in(missing)
        self.before = workers.add("rows", 0)
        progress.committed(self.there, self.total, 0)

    def count(self, commit: Commit) -> None:
        """One more block is safe."""
        rows = self.workers.add("rows", commit.rows[1] - commit.rows[0])
        written = self.workers.add("bytes", sum(digest.size for digest in commit.shards.values()))
        self.progress.committed(min(self.total, self.there + rows - self.before), self.total, written)


def _write_block(writer: GroupWriter, threads: ShardThreads, block: tuple[int, Computed]) -> Commit:
    number, computed = block
    return writer.write_block(number, computed.finish(), threads)
