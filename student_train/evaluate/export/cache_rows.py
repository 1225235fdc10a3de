"""Rows of a store for an export: held-out ones to measure on, and others to find static scales on.

Rows are read as the teacher read them. Where documents share a row and do not see each other, each is a text of its own
to a program that knows token ids and a mask alone: they are taken apart, run one by one, and put together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.data.split import RowRanges, share_out, split_rows
from student_train.evaluate.onnx.quantise import Feed
from student_train.students.pretrained import load_teacher_tokenizer
from teacher_cache.contract.batch import TargetBatch, TargetRequest
from teacher_cache.errors import SettingsError
from teacher_cache.read.pool import CacheSource, parts_of

Reads = Callable[[TargetBatch], TargetBatch]
"""Rows with the teacher's ids to what a student reads."""
Forward = Callable[[Tensor, Tensor], Tensor]
"""Ids and mask [B, T], int64, to what a model says of them, [B, T, ...]."""
Given = Callable[[Tensor, Tensor], Feed]
"""Ids and mask to what a file is fed."""
_ROWS_AT_ONCE = 8


def run_apart(forward: Forward, targets: TargetBatch) -> Tensor:
    """What a model says of rows, [B, T, ...], each of their documents read alone; 0 at padding where they are apart."""
    ids_BT, real_BT = targets.input_ids_BT.long(), targets.real_BT()
    if targets.starts_BT is None:
        return forward(ids_BT, real_BT.long())
    pieces = list(_pieces(targets))
    longest = max(stop - start for _, start, stop in pieces)
    ids_NT = ids_BT.new_zeros((len(pieces), longest))
    mask_NT = torch.zeros_like(ids_NT)
    for place, (row, start, stop) in enumerate(pieces):
        ids_NT[place, : stop - start] = ids_BT[row, start:stop]
        mask_NT[place, : stop - start] = 1
    found = forward(ids_NT, mask_NT)
    whole = found.new_zeros((*ids_BT.shape, *found.shape[2:]))
    for place, (row, start, stop) in enumerate(pieces):
        whole[row, start:stop] = found[place, : stop - start]
    return whole


def _pieces(targets: TargetBatch) -> Iterator[tuple[int, int, int]]:
    """Row, first position and one past the last of each document."""
    assert targets.starts_BT is not None
    for row, length in enumerate(targets.length_B.tolist()):
        starts = sorted({0, *targets.starts_BT[row, :length].nonzero()[:, 0].tolist()})
        yield from ((row, start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Rows for static scales: how many there are, and what is fed."""

    rows: int
    feeds: Sequence[Feed]


def calibration_rows(reader: CacheSource, held_out: RowRanges, count: int, given: Given, reads: Reads) -> Calibration:
    """The first `count` rows that are not held out, of several stores so many of each as its size asks for.

    Raises:
        SettingsError: all rows are held out.
        StoreError: they cannot be read.
    """
    sizes = [part.rows for part in parts_of(reader)]
    training, _ = split_rows(sizes, _kept(sizes, held_out))
    if not training:
        raise SettingsError(
            f"--int8 static needs rows of {reader.path!r} that are not held out, and all are: scales found on the rows "
            "that measure them would look better than they are; give a larger store, or --int8 dynamic"
        )
    lengths = [len(run) for run in training]
    shares = share_out(min(count, sum(lengths)), lengths)
    feeds: list[Feed] = []

    def remember(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        feeds.append(given(ids_BT, mask_BT))
        return ids_BT

    for run, share in zip(training, shares, strict=True):
        for targets in _inputs(reader, run[:share]):
            run_apart(remember, reads(targets))
    return Calibration(rows=sum(shares), feeds=feeds)


def _inputs(reader: CacheSource, run: range) -> Iterator[TargetBatch]:
    """What the teacher read in these rows, a few at a time, in the store's first view."""
    for first in range(run.start, run.stop, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, run.stop)
        yield next(iter(reader.read_rows(first, last, TargetRequest()).values()))


def _kept(sizes: Sequence[int], held_out: RowRanges) -> list[int]:
    """How many rows of each store are held out: its last ones."""
    kept, first = [], 0
    for size in sizes:
        kept.append(sum(len(run) for run in held_out if first <= run.start < first + size))
        first += size
    return kept


def texts_of(reader: CacheSource, rows: RowRanges) -> list[str]:
    """The text of rows, words that were masked put back.

    Raises:
        StoreError: they cannot be read.
        StudentError: the teacher's tokenizer cannot be read.
    """
    # the teacher's own: a student's may know only some of its ids
    tokenizer, texts = load_teacher_tokenizer(reader.teacher_folder()), list[str]()
    for run in rows:
        for targets in _inputs(reader, run):
            ids_BT = targets.input_ids_BT.long()
            if targets.places is not None:
                real_BM = targets.places.real_BM()
                row_N = real_BM.nonzero()[:, 0]
                ids_BT[row_N, targets.places.positions_BM[real_BM].long()] = targets.places.label_ids_BM[real_BM].long()
            texts += [
                str(tokenizer.decode(ids_T[:length].tolist(), skip_special_tokens=True))
                for ids_T, length in zip(ids_BT, targets.length_B.tolist(), strict=True)
            ]
    return texts
