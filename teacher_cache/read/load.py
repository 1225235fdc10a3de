"""What a request needs of one block, read, checked and decompressed: the half of reading that needs no torch.

In: a block, a request and a view. Out: a `CodedBlock`, arrays as they are coded. Only the range of each array that
belongs to the view is decompressed. Thread-safe; whole shards are read, since their hashes are over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.codecs.logits import SampleCodec
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.targets import View
from teacher_cache.format.layout import DISTINCT, StoreLayout
from teacher_cache.format.protocol import shard_key
from teacher_cache.format.shards import decode_shard
from teacher_cache.format.verified import VerifiedObjects
from teacher_cache.read.decode import CodedBlock, in_view
from teacher_cache.read.values import ImpossibleError, check_distinct, check_entries, check_values
from teacher_cache.storage.local import LocalStorage


class BlockLoader:
    """Loads blocks of one store. `layout` is that of all its groups together."""

    def __init__(self, layout: StoreLayout, objects: VerifiedObjects) -> None:
        self._layout = layout
        self._objects = objects

    def load(
        self, block: int, request: TargetRequest, view: View, masked_view: int = 0, threads: Executor | None = None
    ) -> CodedBlock:
        """Read, check and decompress what `request` needs of one block in one view, side by side in `threads`.

        Thread-safe.

        Raises:
            StoreError: a shard is missing, not what was committed, or holds numbers that cannot be.
        """
        in_turn: Callable[..., Iterable[dict[str, NDArray[Any]]]] = map if threads is None else threads.map
        masked_view = masked_view if view == "masked" else 0
        views = self._layout.manifest.views_of(view)
        if not 0 <= masked_view < views:
            raise ValueError(f"masked view {masked_view} is not within 0..{views}")
        with self._told(block):
            arrays: dict[str, NDArray[Any]] = {}
            for tasks in self._rounds(request, view):
                for loaded in in_turn(partial(self._load, block, masked_view, arrays), tasks):
                    arrays |= loaded
            check_values(self._layout, block, arrays)
        return CodedBlock(block=block, view=view, request=request, arrays=arrays)

    @contextmanager
    def _told(self, block: int) -> Iterator[None]:
        """Numbers of a block that cannot be are damage of its store."""
        try:
            yield
        except ImpossibleError as error:
            raise self._objects.impossible(error.path, block, str(error)) from error

    def paths(self, request: TargetRequest, view: View) -> list[str]:
        """The arrays to load for a request in one view."""
        return [*self._row_paths(view), *self._target_paths(request, view)]

    def _row_paths(self, view: View) -> list[str]:
        """What says which rows there are, and which of their positions count."""
        # an encoder's masked view has places of its own, and hears of segments as its plain one does
        folders = ("masked", "segments") if view == "masked" else ("segments", "next")
        return ["input_ids", "length", "row_id", *self._layout.arrays_in(*folders)]

    def _target_paths(self, request: TargetRequest, view: View) -> list[str]:
        targets = self._layout.manifest.targets
        folders = [f"hidden/{n}" for n in request.hidden_layers if in_view(targets.find_hidden(n), view)]
        for layer in request.attention_layers:
            spec = targets.find_attention(layer)
            if spec is not None and spec.view == view:
                folders += [stream.path for stream in self._layout.attention[layer]]
        if request.logits and in_view(targets.logits, view):
            folders.append("logits")
        return self._layout.arrays_in(*folders)

    def _rounds(self, request: TargetRequest, view: View) -> list[list[list[str]]]:
        """The arrays of a request in rounds of tasks; a task is what one thread loads in turn.

        From a disk there is one round. Each packing's codes are a task, so that one layer keeps several threads busy.
        What belongs to the rows shares one, as does an array with those that it counts: handing a small one over takes
        as long as reading it. From afar every array takes as long as a request does and is a task by itself, in a
        second round where another counts it.
        """
        rows, targets = self._row_paths(view), self._target_paths(request, view)
        if not isinstance(self._objects.storage, LocalStorage):
            rounds: list[list[list[str]]] = [[], []]
            for path in (*rows, *targets):
                rounds[self._layout.arrays[path].counted_by is not None].append([path])
            return rounds
        tasks: dict[str, list[str]] = {}
        for path in targets:
            tasks.setdefault(self._layout.arrays[path].counted_by or path, []).append(path)
        return [[rows, *tasks.values()]]

    def _load(
        self, block: int, masked_view: int, before: Mapping[str, NDArray[Any]], paths: Iterable[str]
    ) -> dict[str, NDArray[Any]]:
        """What belongs to one view of a block of these arrays: of one that is filled in part, that part.

        What counts an array is among them, or was loaded `before`.
        """
        loaded: dict[str, NDArray[Any]] = {}
        for path in paths:
            spec = self._layout.arrays[path]
            part = spec.part_of_view(masked_view)
            if spec.counted_by is None:
                loaded[path] = self.load_array(path, block, part)
                continue
            count = loaded[spec.counted_by] if spec.counted_by in loaded else before[spec.counted_by]
            held = int(count.sum(dtype=np.int64))
            check_entries(spec.counted_by, held, spec.block_shape[1])
            loaded[path] = self.load_array(path, block, (part[0], slice(0, held), *part[2:]))[0]
        return loaded

    def load_beside(self, folder: str, block: int) -> list[dict[str, NDArray[Any]]]:
        """Escapes or sinks of a block, checked: of each view the entries that it has, by name. Thread-safe.

        Raises:
            StoreError: a shard is missing, not what was committed, or holds numbers that cannot be.
        """
        arrays = {path: self.load_array(path, block) for path in self._layout.arrays_in(folder)}
        counted = f"{folder}/count"
        found = []
        with self._told(block):
            for view, count in enumerate(arrays.pop(counted).tolist()):
                check_entries(counted, count, min(array.shape[1] for array in arrays.values()))
                held = {path: array[view, :count] for path, array in arrays.items()}
                check_values(self._layout, block, held)
                found.append({path.removeprefix(f"{folder}/"): array for path, array in held.items()})
        return found

    def load_distinct(self, block: int) -> NDArray[Any]:
        """How many different ids were drawn at each place of a block: where the entries of the next ones begin.

        Raises:
            StoreError: the shard is missing, not what was committed, or says more than were drawn.
        """
        assert isinstance(self._layout.logits, SampleCodec)
        distinct_P = self.load_array(DISTINCT, block)
        with self._told(block):
            check_distinct(self._layout.logits, distinct_P)
        return distinct_P

    def load_array(self, path: str, block: int, part: tuple[slice, ...] | None = None) -> NDArray[Any]:
        """A block of one array, or a range of it along each axis: read, checked and decompressed. Thread-safe.

        Raises:
            StoreError: the shard is missing or not what was committed.
        """
        spec = self._layout.arrays[path]
        try:
            return decode_shard(spec, self._objects.shard(path, block), part, hashed=True)
        except ValueError as error:
            raise self._objects.damaged(shard_key(spec, block), f"cannot be decompressed ({error})") from error
