"""One array of a store: the shape of a block of it, and the chunks that a block is compressed in.

Chunks are up to 512 KiB and hold one view, so that a reader takes one view and no more. Which arrays a store has, and
under which paths, is the business of `layout.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from teacher_cache.codecs.base import CodedArraySpec

_CHUNK_BYTES = 2**19


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the store: the shape of a block of it, and of the chunks that block is compressed in.

    A block holds `views` views one after another along `view_axis`, 0 or -1; None where there is one for all views, as
    of the ids. A *ragged* array, [W, room], is filled in part only: `counted_by` is the path of the array whose numbers
    for a view add up to how many entries it has there.
    """

    path: str
    dtype: str
    block_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    view_axis: int | None = None
    views: int = 1
    counted_by: str | None = None

    def part_of_view(self, view: int) -> tuple[slice, ...]:
        """The range of a block along each axis that belongs to one view; of a ragged array with all of its room."""
        part = [slice(0, length) for length in self.block_shape]
        if self.view_axis is not None:
            size = self.block_shape[self.view_axis] // self.views
            part[self.view_axis] = slice(view * size, (view + 1) * size)
        return tuple(part)


@dataclass(frozen=True, kw_only=True)
class ConstantSpec:
    """An array of the store that is not cut into blocks. `positive`: each of its numbers is above 0."""

    dtype: str
    shape: tuple[int, ...]
    positive: bool = False


def whole_array(path: str, dtype: str, *block_shape: int, views: int | None = None) -> ArraySpec:
    """An array of one chunk a block; with `views`, these lie along the first axis."""
    axis = None if views is None else 0
    return ArraySpec(
        path=path, dtype=dtype, block_shape=block_shape, chunk_shape=block_shape, view_axis=axis, views=views or 1
    )


def ragged_array(
    path: str, dtype: str, views: int, chunks: int, chunk: int, *, counted_by: str, width: int | None = None
) -> ArraySpec:
    """An array of which each view fills the part that another one counts; its entries are numbers, or vectors."""
    each = () if width is None else (width,)
    return ArraySpec(
        path=path,
        dtype=dtype,
        block_shape=(views, chunks * chunk, *each),
        chunk_shape=(1, chunk, *each),
        view_axis=0,
        views=views,
        counted_by=counted_by,
    )


def coded_path(folder: str, spec: CodedArraySpec) -> str:
    """Where one of a codec's arrays lies in the folder of what it codes."""
    return f"{folder}/{spec.name}" if spec.name else folder


def coded_array(folder: str, spec: CodedArraySpec, views: int, tokens_per_view: int) -> ArraySpec:
    """A coded array: chunks hold one view of a few components, so that a reader can take a single view."""
    path = coded_path(folder, spec)
    if spec.row_shape is not None:
        return _matrices(path, spec.dtype, spec.row_shape, views, tokens_per_view // spec.row_shape[-1])
    lead: tuple[int, ...] = ()
    chunk = lead
    if spec.components is not None:
        lead, chunk = (spec.components,), (_fitting(spec.components, tokens_per_view, spec.dtype),)
    return ArraySpec(
        path=path,
        dtype=spec.dtype,
        block_shape=(*lead, views * tokens_per_view),
        chunk_shape=(*chunk, tokens_per_view),
        view_axis=-1,
        views=views,
    )


def largest_shard(spec: ArraySpec) -> int:
    """More bytes than a block of this array can take, however badly it is compressed."""
    chunks = prod(length // chunk for length, chunk in zip(spec.block_shape, spec.chunk_shape, strict=True))
    return 2 * prod(spec.block_shape) * _itemsize(spec.dtype) + 1024 * (chunks + 1)


def _matrices(path: str, dtype: str, row_shape: tuple[int, ...], views: int, rows: int) -> ArraySpec:
    """Chunks hold some heads of one row, so that a reader can take any rows."""
    heads, *matrix = row_shape
    return ArraySpec(
        path=path,
        dtype=dtype,
        block_shape=(views * rows, heads, *matrix),
        chunk_shape=(1, _fitting(heads, prod(matrix), dtype), *matrix),
        view_axis=0,
        views=views,
    )


def _fitting(number: int, values_each: int, dtype: str) -> int:
    """How many components or heads, each of so many values, make a chunk: as many as fit that divide their number."""
    most = max(1, _CHUNK_BYTES // (values_each * _itemsize(dtype)))
    return max(part for part in range(1, min(most, number) + 1) if number % part == 0)


def _itemsize(dtype: str) -> int:
    return {"8": 1, "6": 2, "2": 4, "4": 8}[dtype[-1]]  # int8 and uint8, float16, float32 and int32, int64
