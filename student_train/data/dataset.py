"""Rows of a cache as a PyTorch dataset: for `DataLoader`, the Hugging Face `Trainer` and whatever else takes one.

In: a cache, a `TargetRequest`, and row numbers. Out: decoded rows, as dicts of tensors of fixed shapes, which PyTorch's
own collation stacks. A store is read and decompressed by whole blocks and decoded by rows. So each process keeps the
blocks that it met last, as integers, and rows that are asked for together (`__getitems__`, which `DataLoader` uses) are
decoded run by run. In a random order every row would still need a block of its own; `BlockSampler` gives an order that
changes from epoch to epoch and needs each block once. Rows lie in the store in shuffled order, so that the rows of one
block are a random sample of the text already.

A copy in another process, forked or spawned, opens the store for itself. What reads object storage does not survive a
fork; it is refused there.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from student_train.data.order import RowOrder
from student_train.data.source import Cache, open_source, split_source
from student_train.data.split import RowRanges
from teacher_cache.contract.batch import AttentionRelations, SampledLogits, TargetBatch, TargetRequest, TopkLogits
from teacher_cache.contract.streams import VECTORS
from teacher_cache.contract.targets import View
from teacher_cache.errors import SettingsError, StoreError
from teacher_cache.read.decode import CodedBlock
from teacher_cache.read.pool import REMOTE, CacheSource, parts_of

Row = dict[str, Tensor]
_Coded = Mapping[View, CodedBlock]


class CacheDataset(Dataset[Row]):
    """Decoded rows of a cache, by index.

    Every row is a dict of tensors on the CPU:

    | key | shape | what |
    |---|---|---|
    | `row_id` | [] | number of the row in the shuffled text |
    | `attention_mask` | [T] | 1 at tokens, 0 at padding |
    | `input_ids` | [T] | what the teacher read in the plain view |
    | `hidden_L` | [T, D] | hidden state of layer L, float32 |
    | `query_L`, `key_L`, `value_L` | [T, D] | attention vectors of layer L, all heads side by side, float32 |
    | `query_relations_L`, ... | [A, T, T] | in place of them, where the cache holds relations as matrices; float16 |
    | `masked_input_ids` | [T] | what the teacher read in the masked view |
    | `masked_positions`, `masked_original_ids` | [M] | which positions were masked, and what stood there |
    | `masked_real` | [M] | False at places that only fill up: a row may have fewer masked positions than M |
    | `masked_top_ids`, `masked_top_log_probs` | [M, K] | the teacher's most probable ids there, and log-probabilities |
    | `masked_tail_log_prob` | [M] | log of the mass of all other ids |
    | `masked_drawn_ids`, `masked_draw_counts` | [M, K] | in place of them, where the cache holds draws |

    | `segment_starts` | [T] | True where a document begins that does not see those before it, in caches of such rows |
    | `next_positions`, `next_ids` | [M] | of a causal teacher: after which positions it was asked, and what came next |
    | `next_real` | [M] | False at places that only fill up |
    | `next_top_ids`, ..., `next_drawn_ids`, ... | [M, K] | what it says comes there, as in the masked view |

    T is the length of a row, D the teacher's width. The keys of a view are there only if the request needs it, and
    those of the masked view begin with `masked_`: also `masked_hidden_L`, where the cache was built with `--hs-view
    masked`. A student must read the input of the view whose targets it learns, and where there are `segment_starts`,
    each document for itself.

    `masked_view` may be set between epochs, up to the number of `views` that the store was built with.
    """

    def __init__(
        self,
        cache: Cache,
        request: TargetRequest,
        *,
        rows: Literal["train", "valid", "all"] = "train",
        valid_share: float = 0.02,
        masked_view: int = 0,
        blocks_kept: int = 4,
        local_cache: str | None = None,
        local_cache_gib: float = 50.0,
    ) -> None:
        """Open a cache.

        Args:
            cache: a store or several: paths, or what `open_caches` gave.
            request: what to read.
            rows: those that `kdtrain` trains on, those that it holds out, or all.
            valid_share: share of the rows, the last ones of each store, that is held out.
            masked_view: which of several masked inputs of a row to read.
            blocks_kept: how many blocks each process keeps; each takes what it has of the store's targets on disk,
                without its compression.
            local_cache: folder that keeps what is read of stores in object storage.
            local_cache_gib: most that it may hold.

        Raises:
            SettingsError: no row would be left to train on, or there is no such masked view.
            StoreError: the cache cannot be opened.
            TargetsError: the cache does not hold what is asked for.
        """
        self._local_cache = {"local_cache": local_cache, "local_cache_gib": local_cache_gib}
        source = open_source(cache, **self._local_cache)  # type: ignore[arg-type]
        source.require(request)
        self.request = request
        self.blocks_kept = max(1, blocks_kept)
        self.masked_views = source.manifest.views
        self.masked_view = masked_view
        if not 0 <= masked_view < self.masked_views:
            raise SettingsError(
                f"masked_view {masked_view!r}: {source.path!r} has {self.masked_views} masked inputs of each row, "
                f"numbered from 0; give a number below {self.masked_views}"
            )
        self.row_ranges = _ranges(source, rows, valid_share)
        """The rows of the cache that are the rows of this dataset, in order."""
        self.block_bounds = source.block_bounds
        """The first row of each block of the cache, and the number of all rows."""
        self._ends = list(accumulate(map(len, self.row_ranges)))
        self._locations = tuple(part.path for part in parts_of(source))
        self._source: CacheSource | None = source
        self._process = os.getpid()
        self._kept: OrderedDict[tuple[int, int], _Coded] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """One row. Costs a whole block unless that is kept.

        Raises:
            IndexError: there is no such row.
            StoreError: its block cannot be read.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Several rows, in the order asked for: each block is read once, and each run of its rows decoded at once.

        Raises:
            IndexError: there is no such row.
            StoreError: a block cannot be read.
        """
        rows = [self._row(index) for index in indices]
        by_block: dict[int, list[int]] = {}
        for row in dict.fromkeys(rows):
            by_block.setdefault(self._block_of(row), []).append(row)
        found: dict[int, Row] = {}
        for block, members in by_block.items():
            source, coded, first = self._open(), self._coded(block), int(self.block_bounds[block])
            for start, stop in _runs(sorted(members)):
                found |= zip(range(start, stop), self._decode(source, coded, start - first, stop - first), strict=True)
        return [found[row] for row in rows]

    def index_of(self, row: int) -> int:
        """The index here of a row of the cache that is among the `row_ranges`."""
        before = 0
        for run in self.row_ranges:
            if row in run:
                return before + row - run.start
            before += len(run)
        raise ValueError(f"row {row} is none of this dataset's")

    def __getstate__(self) -> dict[str, Any]:
        # an open store belongs to its process
        return {**self.__dict__, "_source": None, "_kept": OrderedDict()}

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        place = bisect_right(self._ends, index)
        return self.row_ranges[place].stop - (self._ends[place] - index)

    def _block_of(self, row: int) -> int:
        return int(self.block_bounds.searchsorted(row, side="right")) - 1

    def _open(self) -> CacheSource:
        """The store, opened by this process."""
        if self._source is None or self._process != os.getpid():
            if self._source is not None and any(REMOTE in location for location in self._locations):
                raise StoreError(
                    f"{self._locations[0]!r} was opened before this process was forked from process {self._process}: "
                    "a connection to object storage does not survive that and would wait for ever; give "
                    'DataLoader(..., multiprocessing_context="spawn")'
                )
            self._source = open_source(self._locations, **self._local_cache)  # type: ignore[arg-type]
            self._process = os.getpid()
            self._kept.clear()
        return self._source

    def _coded(self, block: int) -> _Coded:
        source, key = self._open(), (block, self.masked_view)
        if key not in self._kept:
            while len(self._kept) >= self.blocks_kept:
                self._kept.popitem(last=False)
            self._kept[key] = {
                view: source.load_block(block, self.request, view, self.masked_view if view == "masked" else 0)
                for view in source.views_for(self.request)
            }
        self._kept.move_to_end(key)
        return self._kept[key]

    def _decode(self, source: CacheSource, coded: _Coded, start: int, stop: int) -> list[Row]:
        """Rows start..stop of a block, counted from its first."""
        logits, named = source.manifest.targets.logits, Row()
        for view, block in coded.items():
            named |= _named(view, source.decode(block, start, stop), draws=logits.entries if logits else 0)
        return [{key: values[place] for key, values in named.items()} for place in range(stop - start)]


class BlockSampler(Sampler[int]):
    """Indices of a `CacheDataset` block by block, the blocks in an order that depends on seed and epoch alone.

    It is the order of `kdtrain` with the same seed. Each pass over the sampler is one epoch, the next one after the
    last, or that of `set_epoch`. With several workers, who take turns with the batches, let `workers` be their number
    (times that of the processes, where batches are dealt to several) and `batch_size` that of the loader: then each
    block is read by one of them alone.
    """

    def __init__(self, dataset: CacheDataset, *, seed: int = 0, batch_size: int = 1, workers: int = 1) -> None:
        self._dataset = dataset
        self._order = RowOrder(rows=dataset.row_ranges, bounds=dataset.block_bounds, seed=seed)
        self._batch_size = batch_size
        self._workers = max(1, workers)
        self.epoch = 0
        """The epoch that the next pass gives."""

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be that of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        epoch, rows = self.epoch, len(self._dataset)
        self.epoch += 1
        segments = list(self._order.segments(epoch * rows, (epoch + 1) * rows))
        streams = [self._indices(segments[worker :: self._workers]) for worker in range(self._workers)]
        while streams:
            for stream in tuple(streams):
                batch = list(islice(stream, self._batch_size))
                yield from batch
                if len(batch) < self._batch_size:
                    streams.remove(stream)

    def _indices(self, segments: Iterable[Any]) -> Iterator[int]:
        for segment in segments:
            first = self._dataset.index_of(int(self._dataset.block_bounds[segment.block]) + segment.start)
            yield from range(first, first + segment.stop - segment.start)


def _ranges(source: CacheSource, rows: str, valid_share: float) -> RowRanges:
    if rows == "all":
        return (range(source.rows),)
    if rows not in ("train", "valid"):
        raise SettingsError(f"rows {rows!r}: there are no such rows; give 'train', 'valid' or 'all'")
    training, held_out = split_source(source, valid_share)
    return training if rows == "train" else held_out


def _runs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges start..stop without gaps."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return runs


def _named(view: View, batch: TargetBatch, *, draws: int) -> Row:
    """The tensors of some rows in one view under the names of `CacheDataset`."""
    prefix = "" if view == "plain" else "masked_"
    named: Row = {
        "row_id": batch.row_id_B,
        "attention_mask": batch.real_BT().long(),
        f"{prefix}input_ids": batch.input_ids_BT,
    }
    named |= {f"{prefix}hidden_{layer}": state_BTD for layer, state_BTD in batch.hidden.items()}
    for layer, attention in batch.attention.items():
        held, suffix = ("_relations", "BATT") if isinstance(attention, AttentionRelations) else ("", "BTD")
        named |= {f"{prefix}{name}{held}_{layer}": getattr(attention, f"{name}_{suffix}") for name in VECTORS}
    if batch.starts_BT is not None:
        named["segment_starts"] = batch.starts_BT
    places, label = ("next", "ids") if view == "plain" else ("masked", "original_ids")
    if batch.places is not None:
        named[f"{places}_positions"] = batch.places.positions_BM
        named[f"{places}_{label}"] = batch.places.label_ids_BM
        named[f"{places}_real"] = batch.places.real_BM()
    if isinstance(batch.logits, TopkLogits):
        named[f"{places}_top_ids"] = batch.logits.ids_BMK.long()
        named[f"{places}_top_log_probs"] = batch.logits.log_probs_BMK
        named[f"{places}_tail_log_prob"] = batch.logits.log_tail_BM
    if isinstance(batch.logits, SampledLogits):
        # as many columns in every row: how many ids are distinct differs from row to row
        named[f"{places}_drawn_ids"] = _widened(batch.logits.ids_BMK.long(), draws)
        named[f"{places}_draw_counts"] = _widened(batch.logits.counts_BMK.long(), draws)
    return named


def _widened(values_BMK: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(values_BMK, (0, columns - values_BMK.shape[-1]))
