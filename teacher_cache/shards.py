"""Provisional."""
from __future__ import annotations

from typing import Any
import numpy as np, zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore
from teacher_cache.layout import ArraySpec


def create_array(group: zarr.Group, spec: ArraySpec, blocks: int) -> zarr.Array[Any]:
    return group.create_array(
        spec.path, shape=(blocks, *spec.block_shape), shards=(1, *spec.block_shape), chunks=(1, *spec.chunk_shape),
        dtype=spec.dtype, fill_value=0, serializer=BytesCodec(endian="little"),
        compressors=[ZstdCodec(level=1, checksum=True), Crc32cCodec()], config={"write_empty_chunks": True})


def decode_shard(spec: ArraySpec, data: bytes, part: tuple[slice, ...] | None = None) -> NDArray[Any]:
    d: dict[str, Any] = {}
    a = create_array(zarr.open_group(MemoryStore(d), mode="w"), spec, 1)
    d["/".join([spec.path, "c", "0", *("0" for _ in spec.block_shape)])] = default_buffer_prototype().buffer.from_bytes(data)
    return np.asarray(a[(0, *(part or ()))])
