"""What a request needs of one block, read, checked and decompressed: the half of reading that needs no torch.

In: a block, a request and a view. Out: a `CodedBlock`, arrays as they are coded. Only the range of each array that
belongs to the view is decompressed. Thread-safe; whole shards are read, since their hashes are over all of them.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import attention_folders
from teacher_cache.contract.targets import View
from teacher_cache.format.layout import ROW_ARRAYS, ArraySpec, has_rows_first, ragged_count
from teacher_cache.format.protocol import shard_key
from teacher_cache.format.shards import decode_shard
from teacher_cache.format.verified import VerifiedObjects
from teacher_cache.read.decode import CodedBlock, in_view

_PER_ROW = {"input_ids", *(name for name, _ in ROW_ARRAYS)}


class BlockLoader:
    """Loads blocks of one store. `manifest` is that of all its groups together."""

    def __init__(self, manifest: Manifest, objects: VerifiedObjects) -> None:
        self._manifest = manifest
        self._objects = objects

    def load(self, block: int, request: TargetRequest, view: View, masked_view: int = 0) -> CodedBlock:
        """Read, check and decompress what `request` needs of one block in one view. Thread-safe.

        Raises:
            StoreError: a shard is missing or not what was committed.
        """
        arrays: dict[str, NDArray[np.generic]] = {}
        masked_view = masked_view if view == "masked" else 0
        if not 0 <= masked_view < self._manifest.views_of(view):
            raise ValueError(f"masked view {masked_view} is not within 0..{self._manifest.views_of(view)}")
        for path in self._paths(request, view):
            arrays[path] = self._load(path, block, view, masked_view, arrays)
        return CodedBlock(block=block, view=view, request=request, arrays=arrays)

    def _paths(self, request: TargetRequest, view: View) -> list[str]:
        """The arrays to load for a request in one view, counts before what they count."""
        targets = self._manifest.targets
        folders = [f"hidden/{n}" for n in request.hidden_layers if in_view(targets.find_hidden(n), view)]
        for layer in request.attention_layers:
            spec = targets.find_attention(layer)
            if spec is not None and spec.view == view:
                folders += attention_folders(spec)
        if view == "masked":
            folders.append("masked")
        if request.logits and in_view(targets.logits, view):
            folders.append("logits")
        inside = tuple(f"{folder}/" for folder in folders)
        return ["input_ids", "length", "row_id", *(path for path in self._objects.arrays if path.startswith(inside))]

    def _load(
        self, path: str, block: int, view: View, masked_view: int, loaded: dict[str, NDArray[np.generic]]
    ) -> NDArray[np.generic]:
        part = self._part(self._objects.arrays[path][1], view, masked_view, loaded)
        values = self.load_array(path, block, part)
        return values[0] if ragged_count(path) else values

    def load_array(self, path: str, block: int, part: tuple[slice, ...] | None = None) -> NDArray[Any]:
        """A block of one array, or a range of it along each axis: read, checked and decompressed. Thread-safe.

        Raises:
            StoreError: the shard is missing or not what was committed.
        """
        spec = self._objects.arrays[path][1]
        try:
            return decode_shard(spec, self._objects.shard(path, block), part)
        except ValueError as error:
            raise self._objects.damaged(shard_key(spec, block), f"cannot be decompressed ({error})") from error

    def _part(
        self, spec: ArraySpec, view: View, masked_view: int, loaded: dict[str, NDArray[np.generic]]
    ) -> tuple[slice, ...]:
        """The range of an array's block that belongs to one view."""
        whole = [slice(0, length) for length in spec.block_shape]
        if (count := ragged_count(spec.path)) is not None:
            held = int(cast("Any", loaded[count]).sum(dtype=np.int64))
            whole = [slice(masked_view, masked_view + 1), slice(0, held)]
        elif spec.path.endswith("/escapes/count"):
            whole[0] = slice(masked_view, masked_view + 1)
        elif has_rows_first(spec.path):
            rows = self._manifest.block_rows
            whole[0] = slice(masked_view * rows, (masked_view + 1) * rows)
        elif view == "masked" and spec.path not in _PER_ROW:
            tokens = spec.chunk_shape[-1]
            whole[-1] = slice(masked_view * tokens, (masked_view + 1) * tokens)
        return tuple(whole)
