"""Rows of a source -> the coded arrays of one block, as a build makes them of a teacher's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.build.encode import BlockTargets
from teacher_cache.build.passes import TeacherPass
from teacher_cache.codecs.logits import TopkEntries
from teacher_cache.codecs.nmse import Quantiser
from teacher_cache.contract.streams import VectorStream
from teacher_cache.format.layout import NEXT_KEPT, StoreLayout
from teacher_cache.format.row_bits import pack_row_bits
from teacher_cache.importing.rows import ImportedRows
from teacher_cache.importing.source import SourceRow
from teacher_cache.teacher.outputs import TeacherOutputs


def compute_block(
    layout: StoreLayout, quantisers: Mapping[str, Quantiser], rows: ImportedRows, block: int
) -> BlockTargets:
    """Everything that the store keeps of one block of rows, coded and not yet packed.

    Raises:
        SourceError: a row is not what it was when all of them were checked.
    """
    manifest, (first, last) = layout.manifest, layout.manifest.block_range(block)
    targets = BlockTargets(layout, quantisers)
    padding = rows.teacher.tokenizer.pad_token_id or 0
    input_ids_BT = np.full((last - first, manifest.seq_len), padding, dtype=np.int32)
    kept_BT = np.zeros(input_ids_BT.shape, dtype=bool)
    length_B = np.zeros(last - first, dtype=np.int32)
    columns, found = [], []
    for row, place in enumerate(range(first, last)):
        given = rows.read(place, manifest.seq_len)
        length_B[row] = len(given.input_ids_T)
        input_ids_BT[row, : length_B[row]] = given.input_ids_T
        kept_BT[row] = kept_positions(given, manifest.seq_len)
        if manifest.targets.logits is not None:
            columns.append(row * manifest.places_of("plain") + np.arange(int(kept_BT[row].sum())))
            found.append(rows.topk(place, given, manifest.targets.logits.entries))
        if given.hidden:
            targets.put_vectors(as_pass(given, row, manifest.seq_len))
    targets.put_rows("input_ids", input_ids_BT)
    targets.put_rows("length", length_B)
    targets.put_rows("row_id", rows.row_ids[first:last])
    targets.put_rows("document", rows.row_ids[first:last])
    targets.put_rows(NEXT_KEPT, pack_row_bits(kept_BT))
    if found:
        targets.put_topk(np.concatenate(columns), _together(found))
    return targets


def kept_positions(row: SourceRow, seq_len: int) -> NDArray[np.bool_]:
    """After which of a row's positions [T] something is to be learnt of the next token."""
    kept_T = np.zeros(seq_len, dtype=bool)
    if row.distributions is not None:
        kept_T[row.distributions.position_P] = True
    else:
        kept_T[: len(row.input_ids_T) - 1] = True if row.learnt_T is None else row.learnt_T[1:]
    return kept_T


def as_pass(row: SourceRow, number: int, seq_len: int) -> TeacherPass:
    """The hidden states of row `number` of a block as if a teacher had just read it, padded with zeros."""
    lacking = seq_len - len(row.input_ids_T)
    hidden = {
        layer: torch.nn.functional.pad(values_TD.float(), (0, 0, 0, lacking))[None]
        for layer, values_TD in row.hidden.items()
    }
    return TeacherPass(
        view="plain",
        masked_view=0,
        first=number,
        real_BT=(torch.arange(seq_len) < len(row.input_ids_T))[None],
        outputs=TeacherOutputs(hidden=hidden, attention={}, final_BTD=torch.empty(1, seq_len, 0)),
    )


def read_streams(
    rows: ImportedRows, seq_len: int, streams: Sequence[VectorStream], wanted: range
) -> Iterator[tuple[VectorStream, torch.Tensor, torch.Tensor]]:
    """What streams keep of a range of rows, a row at a time, to calibrate on."""
    for place in wanted:
        one = as_pass(rows.read(place, seq_len), 0, seq_len)
        for stream in streams:
            yield stream, one.outputs.hidden[stream.layer], one.real_BT


def _together(found: list[TopkEntries]) -> TopkEntries:
    return TopkEntries(
        **{name: torch.cat([getattr(one, name) for one in found]) for name in ("ids_PK", "log_probs_PK", "log_tail_P")}
    )
