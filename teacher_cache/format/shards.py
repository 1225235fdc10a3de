"""One block of one array <-> the bytes of its shard.

A shard is what zarr v3's `sharding_indexed` codec makes of a block: inner chunks, each little-endian numbers -> zstd
(level 1, with its own checksum) -> crc32c, in any order; at the end (offset, size) of every chunk, in C order of the
chunk grid, and the crc32c of that index. `encode_shard` and `decode_shard` write and read these bytes on their own,
because zarr spends several times as long around a chunk as in its compression, and reads a chunk that is missing as
zeros. What is written is what zarr 3.1 writes, byte for byte, its order of the chunks included.

Nearly all of the time of decoding is zstd's Huffman stage, about 1.5e9 bytes/s on one core: chunks are decompressed
straight into their place in the result, without a look at their checksums where a hash over the whole shard vouches for
them. Encoding runs at about 0.7e9 bytes/s. Both leave the interpreter lock to others meanwhile. Nothing here touches a
disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
import zarr
from numcodecs import zstd
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from teacher_cache.format.arrays import ArraySpec

if TYPE_CHECKING:
    from zarr.core.array_spec import ArrayConfigLike

_EVERY_CHUNK: ArrayConfigLike = {"write_empty_chunks": True}
_CRC_BYTES = 4
_ENTRY_BYTES = 16
_MISSING = 2**64 - 1
_ZSTD_LEVEL = 1
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# RFC 8878, 3.1.1: the frame header's first byte, its Content_Checksum_flag, and what ends a frame that has one
_ZSTD_DESCRIPTOR = 4
_ZSTD_HAS_CHECKSUM = 1 << 2
_ZSTD_CHECKSUM_BYTES = 4


def create_array(group: zarr.Group, spec: ArraySpec, blocks: int) -> zarr.Array[Any]:
    """The array of a store of so many blocks, to write in whole blocks."""
    return group.create_array(
        spec.path,
        shape=(blocks, *spec.block_shape),
        shards=(1, *spec.block_shape),
        chunks=(1, *spec.chunk_shape),
        dtype=spec.dtype,
        fill_value=0,
        serializer=BytesCodec(endian="little"),
        # zstd's own checksum as well: some readers skip the outer one on partial reads
        compressors=[ZstdCodec(level=_ZSTD_LEVEL, checksum=True), Crc32cCodec()],
        config=_EVERY_CHUNK,
    )


def encode_shard(spec: ArraySpec, block: NDArray[Any]) -> bytes:
    """The shard of a block.

    Raises:
        ValueError: the block has another shape than the array's.
    """
    if block.shape != spec.block_shape:
        raise ValueError(f"a block of {spec.path} has shape {spec.block_shape}, and {block.shape} was given")
    values = block.astype(np.dtype(spec.dtype).newbyteorder("<"), copy=False)
    grid = tuple(length // chunk for length, chunk in zip(spec.block_shape, spec.chunk_shape, strict=True))
    order = _writing_order(grid)
    index = np.empty((len(order), 2), dtype="<u8")
    parts, offset = list[bytes](), 0
    for number, place in order:
        chunk = values[
            tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, spec.chunk_shape, strict=True))
        ]
        frame = _compress(np.ascontiguousarray(chunk))
        parts += [frame, google_crc32c.value(frame).to_bytes(_CRC_BYTES, "little")]
        index[number] = offset, len(frame) + _CRC_BYTES
        offset += len(frame) + _CRC_BYTES
    listed = index.tobytes()
    return b"".join([*parts, listed, google_crc32c.value(listed).to_bytes(_CRC_BYTES, "little")])


def _compress(chunk: NDArray[Any]) -> bytes:
    data = chunk.reshape(-1).view(np.uint8)
    # there is room for more escapes and draws than come, so that many chunks are nothing but zeros
    return bytes(zstd.compress(data, _ZSTD_LEVEL, True)) if data.any() else _frame_of_zeros(len(data))


@lru_cache
def _frame_of_zeros(size: int) -> bytes:
    return bytes(zstd.compress(bytes(size), _ZSTD_LEVEL, True))


@lru_cache
def _writing_order(grid: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Number in the index and place of every chunk, in the order in which zarr writes them.

    That is Morton's: by the bits of all coordinates interleaved, the lowest first and those of the first axis first of
    equals; an axis has as many bits as its last coordinate needs.
    """

    def morton(place: tuple[int, ...]) -> int:
        bits = [
            (place[axis] >> bit) & 1
            for bit in range(max(grid).bit_length())
            for axis, length in enumerate(grid)
            if bit < (length - 1).bit_length()
        ]
        return sum(bit << at for at, bit in enumerate(bits))

    places = itertools.product(*map(range, grid))
    return tuple(sorted(enumerate(places), key=lambda numbered: morton(numbered[1])))


def decode_shard(
    spec: ArraySpec, data: bytes, part: tuple[slice, ...] | None = None, *, hashed: bool = False
) -> NDArray[Any]:
    """The block in a shard, or a part of it: a range along each axis, of which only the chunks it touches are decoded.

    `hashed`: that these are the bytes that were written is known, from a hash over all of them. The checksums of chunks
    say next to nothing more, in a sixth of the time of decoding, and are left out.

    Raises:
        ValueError: the shard is not what was written: cut short, changed (if not `hashed`), or of another array. Or
            `part` is not a range of the block.
    """
    bounds = _bounds(spec, part)
    values = np.empty([stop - start for start, stop in bounds], dtype=np.dtype(spec.dtype).newbyteorder("<"))
    entries, end = _read_index(spec, data)
    chunk_bytes = prod(spec.chunk_shape) * values.itemsize
    scratch = None
    for piece in _pieces(spec, bounds):
        frame = _frame(piece, entries[piece.number], data, end, chunk_bytes, hashed=hashed)
        target = values[piece.target]
        if piece.whole and target.flags.c_contiguous:
            _decompress(piece, frame, target)
            continue
        if scratch is None:
            scratch = np.empty(spec.chunk_shape, dtype=values.dtype)
        _decompress(piece, frame, scratch)
        target[...] = scratch[piece.source]
    return values


def frames_to_decompress(spec: ArraySpec, data: bytes) -> Iterator[tuple[memoryview | bytearray, int]]:
    """What `decode_shard` decompresses of a whole shard that is `hashed`: frames, and how many bytes each holds.

    Raises:
        ValueError: the shard is not of this array, or cut short.
    """
    entries, end = _read_index(spec, data)
    chunk_bytes = prod(spec.chunk_shape) * np.dtype(spec.dtype).itemsize
    for piece in _pieces(spec, _bounds(spec, None)):
        yield _frame(piece, entries[piece.number], data, end, chunk_bytes, hashed=True), chunk_bytes


class _ChunkSpan(NamedTuple):
    """What the result takes from one inner chunk, the number of which is its place in the index."""

    number: int
    target: tuple[slice, ...]
    source: tuple[slice, ...]
    whole: bool


def _bounds(spec: ArraySpec, part: tuple[slice, ...] | None) -> list[tuple[int, int]]:
    """Start and stop of a part along each axis."""
    shape = spec.block_shape
    part = (slice(None),) * len(shape) if part is None else part
    if len(part) != len(shape):
        raise ValueError(f"part {part!r} does not have the {len(shape)} axes of a block of shape {shape}")
    bounds = []
    for wanted, length in zip(part, shape, strict=True):
        start, stop, step = wanted.indices(length)
        # indices() cuts off what is beyond the axis: fewer numbers than asked for would go unnoticed
        if step != 1 or start > stop or wanted.start not in (None, start) or wanted.stop not in (None, stop):
            raise ValueError(f"part {part!r} is not a range of a block of shape {shape}")
        bounds.append((start, stop))
    return bounds


def _pieces(spec: ArraySpec, bounds: list[tuple[int, int]]) -> Iterator[_ChunkSpan]:
    """The chunks that a part touches, in the order of the index."""
    axes = []
    chunks = 1  # of a step along the axis
    for (start, stop), length, chunk in reversed(list(zip(bounds, spec.block_shape, spec.chunk_shape, strict=True))):
        along = []
        for place in range(start // chunk, -(-stop // chunk)) if start < stop else ():
            first, last = max(start, place * chunk), min(stop, (place + 1) * chunk)
            target = slice(first - start, last - start)
            source = slice(first - place * chunk, last - place * chunk)
            along.append((place * chunks, target, source, last - first == chunk))
        axes.append(along)
        chunks *= length // chunk
    for on_axes in itertools.product(*reversed(axes)):
        numbers, targets, sources, wholes = zip(*on_axes, strict=True)
        yield _ChunkSpan(sum(numbers), targets, sources, all(wholes))


def _read_index(spec: ArraySpec, data: bytes) -> tuple[list[list[int]], int]:
    """Offset and size of every chunk, and where the chunks end and the index begins."""
    chunks = prod(length // chunk for length, chunk in zip(spec.block_shape, spec.chunk_shape, strict=True))
    end = len(data) - chunks * _ENTRY_BYTES - _CRC_BYTES
    if end < 0:
        raise ValueError(f"its {len(data)} bytes do not hold the index of {chunks} chunks")
    index, crc = data[end:-_CRC_BYTES], data[-_CRC_BYTES:]
    if google_crc32c.value(index) != int.from_bytes(crc, "little"):
        raise ValueError("its index does not match its checksum")
    entries: list[list[int]] = np.frombuffer(index, dtype="<u8").reshape(chunks, 2).tolist()
    return entries, end


def _frame(
    piece: _ChunkSpan, entry: list[int], data: bytes, end: int, chunk_bytes: int, *, hashed: bool
) -> memoryview | bytearray:
    """The zstd frame of a chunk, checked as far as it can be without decompressing it."""
    offset, size = entry
    if offset == _MISSING:
        raise ValueError(f"chunk {piece.number} is missing")
    if size <= _CRC_BYTES or offset + size > end:
        raise ValueError(f"chunk {piece.number} lies at {offset}+{size} of {end} bytes")
    checked = offset + size - _CRC_BYTES
    frame = memoryview(data)[offset:checked]
    if not hashed and google_crc32c.value(bytes(frame)) != int.from_bytes(data[checked : offset + size], "little"):
        raise ValueError(f"chunk {piece.number} does not match its checksum")
    have = _content_bytes(frame)
    if have != chunk_bytes:
        raise ValueError(f"chunk {piece.number} holds {have} bytes instead of {chunk_bytes}")
    return _without_checksum(frame) if hashed else frame


def _without_checksum(frame: memoryview) -> bytearray:
    """A single zstd frame without the checksum of its contents, which no setting of the library ignores.

    If another frame follows, what is cut off is not the checksum, and zstd refuses the rest.
    """
    bare = bytearray(frame)
    if bare[_ZSTD_DESCRIPTOR] & _ZSTD_HAS_CHECKSUM:
        bare[_ZSTD_DESCRIPTOR] &= ~_ZSTD_HAS_CHECKSUM
        del bare[-_ZSTD_CHECKSUM_BYTES:]
    return bare


def _content_bytes(frame: memoryview) -> int | None:
    """How many bytes a zstd frame decompresses to (RFC 8878, 3.1.1.1), None if it does not say.

    The library fills as much of its destination as the frame says and is silent about the rest.
    """
    if len(frame) < 6 or frame[:4] != _ZSTD_MAGIC:
        return None
    descriptor = frame[_ZSTD_DESCRIPTOR]
    single_segment, field = descriptor >> 5 & 1, descriptor >> 6
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[field]
    if width == 0:
        return None
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


def _decompress(piece: _ChunkSpan, frame: memoryview | bytearray, target: NDArray[Any]) -> None:
    try:
        zstd.decompress(frame, target)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"chunk {piece.number} cannot be decompressed ({error})") from error
