"""Rows -> what the teacher computes for them, batch by batch and view by view. Nothing is kept here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import VectorStream
from teacher_cache.contract.targets import View
from teacher_cache.corpus.corpus import RowBlock, Rows
from teacher_cache.corpus.masking import MaskedRows, mask_rows
from teacher_cache.corpus.next_tokens import next_token_places
from teacher_cache.format.row_bits import set_positions
from teacher_cache.teacher.outputs import TeacherOutputs, stream_values
from teacher_cache.teacher.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class TeacherPass:
    """One forward pass over rows `first`, `first` + 1, … of a block in one view.

    `masked` and `kept_BT`, the positions of a causal teacher's rows after which the distribution is kept, cover the
    whole block.
    """

    view: View
    masked_view: int
    first: int
    real_BT: torch.Tensor
    outputs: TeacherOutputs
    masked: MaskedRows | None = None
    kept_BT: NDArray[np.bool_] | None = None

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
        """Positions [B, M] whose distribution is kept of the rows of this pass, and which of the M are real."""
        rows = slice(self.first, self.first + len(self.real_BT))
        if self.masked is not None:
            positions_BM, count_B = self.masked.positions_BM[rows].astype(np.int64), self.masked.count_B[rows]
            return positions_BM, np.arange(positions_BM.shape[1]) < count_B[:, None]
        if self.kept_BT is None:
            return None
        return set_positions(self.kept_BT[rows], self.kept_BT.shape[1])


def run_views(
    manifest: Manifest,
    teacher: Teacher,
    streams: tuple[VectorStream, ...],
    rows: RowBlock,
    batch_rows: int,
    views: Iterable[View],
) -> Iterator[TeacherPass]:
    """Read rows in each of these views, in batches that start at the first row."""
    for view in views:
        for masked_view in range(manifest.views_of(view)):
            masked = _mask(manifest, teacher, rows, masked_view) if view == "masked" else None
            kept_BT = _kept_positions(manifest, rows) if view == "plain" else None
            input_ids_BT = rows.input_ids_BT if masked is None else masked.apply(rows.input_ids_BT)
            for first in range(0, len(input_ids_BT), batch_rows):
                ids_BT, length_B = (values[first : first + batch_rows] for values in (input_ids_BT, rows.length_B))
                starts_BT = None if rows.starts_BT is None else rows.starts_BT[first : first + batch_rows]
                taken = [stream for stream in streams if stream.view == view]
                outputs = _run(teacher, taken, ids_BT, length_B, starts_BT)
                real_BT = torch.arange(ids_BT.shape[1]) < torch.from_numpy(length_B)[:, None]
                yield TeacherPass(
                    view=view,
                    masked_view=masked_view,
                    first=first,
                    real_BT=real_BT.to(teacher.device),
                    outputs=outputs,
                    masked=masked,
                    kept_BT=kept_BT,
                )


def run_streams(
    manifest: Manifest, teacher: Teacher, streams: Sequence[VectorStream], rows: Rows, wanted: range, batch_rows: int
) -> Iterator[tuple[int, VectorStream, torch.Tensor, torch.Tensor]]:
    """What these streams would keep of some rows: the first row, the stream, values [B, T, D], real positions [B, T].

    Only views that one of the streams is taken from are run, not those that only logits need.
    """
    views = sorted({stream.view for stream in streams})
    for first in range(wanted.start, wanted.stop, batch_rows):
        part = rows.read(first, min(first + batch_rows, wanted.stop))
        for one in run_views(manifest, teacher, tuple(streams), part, batch_rows, views):
            for stream in streams:
                if stream.view == one.view:
                    yield first, stream, stream_values(stream, one.outputs, one.real_BT), one.real_BT


def _kept_positions(manifest: Manifest, rows: RowBlock) -> NDArray[np.bool_] | None:
    """The positions [B, T] of a causal teacher's rows after which the distribution is kept; None for others."""
    if manifest.positions is None:
        return None
    return next_token_places(rows, positions=manifest.positions, seed=manifest.seed)


def _run(
    teacher: Teacher,
    streams: list[VectorStream],
    input_ids_BT: NDArray[np.int32],
    length_B: NDArray[np.int32],
    starts_BT: NDArray[np.bool_] | None,
) -> TeacherOutputs:
    return teacher.run(
        torch.from_numpy(input_ids_BT).long(),
        torch.from_numpy(length_B),
        hidden_layers={stream.layer for stream in streams if stream.source == "hidden"},
        attention_layers={stream.layer for stream in streams if not stream.makes_attention},
        given_layers={stream.layer for stream in streams if stream.source == "given"},
        starts_BT=None if starts_BT is None else torch.from_numpy(starts_BT),
    )


def _mask(manifest: Manifest, teacher: Teacher, rows: RowBlock, masked_view: int) -> MaskedRows:
    return mask_rows(
        rows.input_ids_BT,
        rows.length_B,
        rows.row_id_B,
        special_ids=teacher.tokenizer.all_special_ids,
        mask_id=teacher.tokenizer.mask_token_id,
        vocab_size=len(teacher.tokenizer),
        places=manifest.masked_per_row,
        probability=manifest.mlm_probability,
        seed=manifest.seed,
        view=masked_view,
    )
