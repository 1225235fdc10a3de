"""Rows of a cache as training batches: in an order that one number describes, read ahead, decoded on the device.

An epoch is a permutation of the blocks, of all stores if there are several, that depends on (seed, epoch) alone; the
rows of epoch after epoch form one endless stream, which is cut into global batches. Rank r of R takes the r-th
contiguous share of each. So the global batches do not depend on R, and the place in the stream is one integer: the rows
before it. Masked view `epoch mod views` is read in each epoch.

Threads read, check and decompress whole blocks ahead of the consumer, a bounded number of them, several arrays at a
time, and send them to the device from pinned memory, in a stream of their own; decoding to float32 runs in the
consumer, on the device, row range by row range. Memory, on the device: the compressed-integer form of at most
`READ_AHEAD + 2` blocks, however many threads there are. No process is forked and no shared memory is used. The threads
end when the loader is closed or collected.

Damaged blocks end the training, or, where `skip_damaged` says so, their rows are left out of the batches they belong to
and counted; all other rows stay where they are. What cannot be reached at all always ends it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from student_train.data.order import ReadingPlan, RowOrder, Segment
from student_train.data.split import RowRanges
from teacher_cache.contract.batch import Batch, TargetBatch, TargetRequest, concatenate
from teacher_cache.contract.targets import View
from teacher_cache.device import Transfer
from teacher_cache.errors import DamagedStoreError, DistillationError, StoreError
from teacher_cache.read.decode import CodedBlock
from teacher_cache.read.pool import CacheSource
from teacher_cache.threads import ReadingThreads, usable_cores

THREAD_NAME = "kdtrain-loader"
READ_AHEAD = 2
_MOST_THREADS = 8
_POLL_SECONDS = 0.1
_LONGEST_JOIN_SECONDS = 5.0

HostFacts = dict[str, NDArray[Any]]
_Loaded = dict[View, CodedBlock] | Exception


class WaitingEnded(Exception):  # noqa: N818 - nothing is wrong
    """Whoever waited for the next batch is to do something else."""


@dataclass(frozen=True, kw_only=True)
class LoadedRows:
    """Rows start..stop of a block that is read but not decoded."""

    blocks: Mapping[View, CodedBlock]
    start: int
    stop: int
    decoder: Callable[[CodedBlock, int, int], TargetBatch]

    def decode(self, start: int, stop: int) -> Batch:
        """Rows of the block, counted from its first, in every view."""
        return {view: self.decoder(block, start, stop) for view, block in self.blocks.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One rank's share of a global batch. `position` is the number of rows of the stream before the global batch.

    `counts` are what the losses of this share are sums over: real `positions`, `masked` ones (0 without them), `rows`.
    They and `row_ids` are on the host already, so that looking at them does not wait for the device. `blocks` are those
    that the rows come from. `left_out` rows of damaged blocks are not among them, and `damage` says what is wrong with
    each such block that is met. The targets are decoded on the device when they are asked for: of a pass, not of the
    whole share.
    """

    position: int
    pieces: tuple[LoadedRows, ...]
    counts: Mapping[str, int]
    row_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    left_out: int
    damage: tuple[str, ...]

    @property
    def views(self) -> Batch:
        """All rows of this share in every view; empty where there are none."""
        return self.part(0, len(self.row_ids))

    def part(self, start: int, stop: int) -> Batch:
        """Rows start..stop of this share in every view; empty where there are none."""
        decoded, first = list[Batch](), 0
        for piece in self.pieces:
            low, high = max(start - first, 0), min(stop - first, piece.stop - piece.start)
            if low < high:
                decoded.append(piece.decode(piece.start + low, piece.start + high))
            first += piece.stop - piece.start
        return {view: concatenate([part[view] for part in decoded]) for view in (decoded[0] if decoded else ())}


class CacheLoader(Iterator[TrainingBatch]):
    """Iterates over the training batches of `rows` from `position` on, endlessly or up to `stop` rows of the stream.

    Every rank gets as many batches; a last one cut by `stop` is short, and may hold no rows for some. Raises what
    reading raised, with the block named. `position` is where the next batch begins: a loader that starts there goes on
    as this one would. As a context manager it is closed at the end.
    """

    def __init__(
        self,
        reader: CacheSource,
        request: TargetRequest,
        *,
        rows: RowRanges,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        stop: int | None = None,
        device: str = "cpu",
        skip_damaged: bool = False,
    ) -> None:
        self.position = position
        self.wait_seconds = 0.0
        self.stop_waiting: Callable[[], bool] = lambda: False
        """Asked while a block is waited for; where it says so, `WaitingEnded` is raised."""
        self._decoder = partial(reader.decode, device=device)
        self._visit: tuple[int, int] | None = None
        self._skip_damaged = skip_damaged
        self._blocks: dict[View, CodedBlock] | DamagedStoreError = {}
        order = RowOrder(rows=rows, bounds=reader.block_bounds, seed=seed)
        plan = ReadingPlan(
            order=order, batch_size=batch_size, rank=rank, world_size=world_size, position=position, stop=stop
        )
        self._batches, self._visits = plan.batches(), plan.visits()
        # blocks wait for their arrays, and have threads of their own
        self._threads = tuple(
            ReadingThreads(threads, THREAD_NAME) for threads in (READ_AHEAD + 1, min(_MOST_THREADS, usable_cores()))
        )
        self._load = partial(_load, reader, request, Transfer(device), self._threads[1])
        self._ahead: deque[Future[_Loaded]] = deque()
        self._closed = False
        self._read_on()

    def __next__(self) -> TrainingBatch:
        if self._closed:
            raise StopIteration
        position, rows, segments = next(self._batches)
        pieces: list[LoadedRows] = []
        facts: list[HostFacts] = []
        damage: list[str] = []
        left_out = 0
        for segment in segments:
            blocks = self._visit_block(segment)
            if isinstance(blocks, DamagedStoreError):
                damage.append(str(blocks))
                left_out += segment.stop - segment.start
                continue
            pieces.append(LoadedRows(blocks=blocks, start=segment.start, stop=segment.stop, decoder=self._decoder))
            facts.append(_host_facts(blocks, segment.start, segment.stop))
        self.position = position + rows
        return TrainingBatch(
            position=position,
            pieces=tuple(pieces),
            counts={name: sum(int(fact[name].sum()) for fact in facts) for name in ("positions", "places", "rows")},
            row_ids=tuple(row_id for fact in facts for row_id in fact["row_ids"].tolist()),
            blocks=tuple(dict.fromkeys(segment.block for segment in segments)),
            left_out=left_out,
            damage=tuple(damage),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads. The loader gives nothing afterwards.

        A thread that waits for storage to come back is not waited for: it only reads.
        """
        self._closed = True
        for threads in self._threads:
            threads.shutdown()
        until = time.monotonic() + _LONGEST_JOIN_SECONDS
        for threads in self._threads:
            threads.join(until - time.monotonic())
        self._ahead.clear()
        self._blocks = {}

    @property
    def blocks_ahead(self) -> int:
        """Blocks that are read and that no batch was taken from yet."""
        return sum(one.done() for one in self._ahead)

    def _read_on(self) -> None:
        """Have the next blocks read."""
        for epoch, block in islice(self._visits, READ_AHEAD + 1 - len(self._ahead)):
            self._ahead.append(self._threads[0].submit(self._load, epoch, block))

    def _visit_block(self, segment: Segment) -> dict[View, CodedBlock] | DamagedStoreError:
        visit = (segment.epoch, segment.block)
        if visit != self._visit:
            started = time.perf_counter()
            loaded = self._wait()
            self.wait_seconds += time.perf_counter() - started
            if isinstance(loaded, Exception) and not (self._skip_damaged and isinstance(loaded, DamagedStoreError)):
                self.close()
                raise loaded
            assert isinstance(loaded, dict | DamagedStoreError)
            self._visit, self._blocks = visit, loaded
        return self._blocks

    def _wait(self) -> _Loaded:
        while True:
            try:
                loaded = self._ahead[0].result(timeout=_POLL_SECONDS)
            except TimeoutError:
                if self.stop_waiting():
                    raise WaitingEnded from None
                continue
            self._ahead.popleft()
            self._read_on()
            return loaded


def _load(
    reader: CacheSource, request: TargetRequest, transfer: Transfer, threads: Executor, epoch: int, block: int
) -> _Loaded:
    """A block in every view, on its way to the device; or what is wrong with it, which the consumer raises."""
    try:
        return {
            view: reader.load_block(
                block, request, view, masked_view=epoch % reader.manifest.views_of(view), threads=threads
            ).sent(transfer)
            for view in reader.views_for(request)
        }
    except Exception as error:  # noqa: BLE001 - the consumer raises it
        return _name_block(error, reader, block)


def _name_block(error: Exception, reader: CacheSource, block: int) -> Exception:
    if isinstance(error, DistillationError | OSError):
        kind = DamagedStoreError if isinstance(error, DamagedStoreError) else StoreError
        named = kind(f"block {block} of {reader.path} cannot be read, training needs every row of it: {error}")
        named.__cause__ = error
        return named
    error.add_note(f"while reading block {block} of {reader.path}")
    return error


def _host_facts(blocks: Mapping[View, CodedBlock], start: int, stop: int) -> HostFacts:
    """Row ids, and what is counted, of rows start..stop of a block."""
    first, *_ = blocks.values()
    return {
        "row_ids": first.on_host("row_id")[start:stop],
        "positions": first.on_host("length")[start:stop],
        "places": np.array([max(block.count_places(start, stop) for block in blocks.values())]),
        "rows": np.ones(stop - start),
    }
