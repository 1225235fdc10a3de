"""The variance of hidden states over a store, by which losses on them are divided.

Measured on the first blocks as they are stored. Cost: these blocks are decoded, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.format.small_arrays import has_constant, write_constant
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import Storage

_BLOCKS = 4
_ROWS_AT_ONCE = 16


def write_variances(storage: Storage, manifest: Manifest, complete: Collection[str]) -> None:
    """Write E||h - mean||^2 of each hidden state of a group, where it is not there; `complete` as for the reader."""
    reader = CacheReader.of(storage, complete=complete)
    blocks = min(manifest.blocks, _BLOCKS)
    for layer in manifest.targets.hidden_layers():
        path = f"hidden/{layer}/variance"
        if not has_constant(storage, path):
            write_constant(storage, path, np.array(_total_variance(reader, layer, blocks)))


def _total_variance(reader: CacheReader, layer: int, blocks: int) -> float:
    """E||h - mean||^2 over the real positions of the first blocks, from sums of a few rows at a time."""
    count, total_D, squares = 0, torch.zeros(reader.manifest.teacher.hidden_size, dtype=torch.float64), 0.0
    request = TargetRequest(hidden_layers=(layer,))
    (view,) = reader.views_for(request)
    for block in range(blocks):
        coded = reader.load_block(block, request, view)
        first, last = reader.manifest.block_range(block)
        for start in range(0, last - first, _ROWS_AT_ONCE):
            targets = reader.decode(coded, start, min(start + _ROWS_AT_ONCE, last - first))
            values_ND = targets.hidden[layer][targets.real_BT()].double()
            count += len(values_ND)
            total_D += values_ND.sum(dim=0)
            squares += float(values_ND.square().sum())
    return squares / count - float((total_D / count).square().sum())
