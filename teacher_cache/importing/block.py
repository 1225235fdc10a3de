"""Rows of a source -> the coded arrays of one block, as a build makes them of a teacher's outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from teacher_cache.build.encode import BlockTargets
from teacher_cache.codecs.logits import TopkEntries
from teacher_cache.codecs.nmse import Quantiser
from teacher_cache.format.layout import NEXT_KEPT, StoreLayout
from teacher_cache.format.row_bits import pack_row_bits
from teacher_cache.importing.rows import ImportedRows


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
        if manifest.targets.logits is not None:
            kept_BT[row, given.distributions.position_P] = True
            columns.append(row * manifest.places_of("plain") + np.arange(len(given.distributions.position_P)))
            found.append(rows.topk(place, given, manifest.targets.logits.entries))
    targets.put_rows("input_ids", input_ids_BT)
    targets.put_rows("length", length_B)
    targets.put_rows("row_id", rows.row_ids[first:last])
    targets.put_rows("document", rows.row_ids[first:last])
    targets.put_rows(NEXT_KEPT, pack_row_bits(kept_BT))
    if found:
        targets.put_topk(np.concatenate(columns), _together(found))
    return targets


def _together(found: list[TopkEntries]) -> TopkEntries:
    return TopkEntries(
        **{name: torch.cat([getattr(one, name) for one in found]) for name in ("ids_PK", "log_probs_PK", "log_tail_P")}
    )
