"""Coordinates of packed streams are those of plain division by the documented layout, for any range of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from teacher_cache.batch import TargetRequest
from teacher_cache.contract import Manifest
from teacher_cache.decode import CodedBlock
from teacher_cache.packing import ranges
from teacher_cache.reader import CacheReader

LAYER = 4


def coordinates_plainly(manifest: Manifest, coded: CodedBlock) -> NDArray[np.float32]:
    """All coordinates [N, D] of a block: one digit after the other, then the escapes, then times step."""
    path, tokens = f"hidden/{LAYER}", manifest.block_rows * manifest.seq_len
    record = manifest.calibration[path]
    codes_DN = np.zeros((sum(record.components.values()), tokens), dtype=np.int64)
    for packing, part in ranges(record.components):
        packed = coded.arrays[f"{path}/codes/{packing.name}"].astype(np.int64)
        radix = 2 * packing.limit + 1
        for token in range(tokens):
            value = packed[:, token // packing.per_byte]
            if packing.per_byte > 1:
                value = value // radix ** (packing.per_byte - 1 - token % packing.per_byte) % radix - packing.limit
            codes_DN[part, token] = value
    for index, value in zip(*(coded.arrays[f"{path}/escapes/{name}"] for name in ("index", "value")), strict=True):
        codes_DN[divmod(int(index), tokens)] = value
    return codes_DN.T.astype(np.float32) * np.float32(record.step)


@pytest.mark.parametrize("block", [0, 2])
def test_coordinates_are_those_of_plain_division(nmse_store: Path, block: int) -> None:
    reader = CacheReader.open(nmse_store)
    request = TargetRequest(hidden_layers=(LAYER,), rotated_layers=(LAYER,))
    (view,) = reader.views_for(request)
    coded = reader.load_block(block, request, view)
    expected_ND = coordinates_plainly(reader.manifest, coded)
    rows, positions = int(np.diff(reader.block_bounds)[block]), reader.manifest.seq_len
    expected_BTD = torch.from_numpy(expected_ND).reshape(-1, positions, expected_ND.shape[1])
    for start in range(rows):
        for stop in range(start + 1, rows + 1):
            have_BTD = reader.decode(coded, start, stop).hidden[LAYER]
            assert torch.equal(have_BTD, expected_BTD[start:stop])
