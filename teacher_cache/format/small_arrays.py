"""Small arrays of a store that are not cut into blocks, such as projections: each one uncompressed, checksummed chunk.

zarr encodes them in memory, and only whole objects go to and from the storage. Decoding is our own: what zarr makes of
bytes depends on metadata that came with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from teacher_cache.errors import StoreError
from teacher_cache.format.arrays import ConstantSpec
from teacher_cache.format.protocol import METADATA, NOT_AN_OBJECT, read_small
from teacher_cache.outside import parse_json
from teacher_cache.storage.base import Storage

if TYPE_CHECKING:
    from zarr.core.array_spec import ArrayConfigLike

EVERY_CHUNK: ArrayConfigLike = {"write_empty_chunks": True}
"""zarr leaves out chunks of zeros otherwise, and reads every chunk that is missing as zeros."""
_TYPES = ("float16", "float32", "float64")
_CRC_BYTES = 4
_AS_WRITTEN: Mapping[str, Any] = {
    "zarr_format": 3,
    "node_type": "array",
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    "storage_transformers": [],
}


def encode_constant(path: str, value: NDArray[np.generic]) -> dict[str, bytes]:
    """The objects of a small array by key, its chunk last, and the zarr.json of the groups around it."""
    objects: dict[str, Any] = {}
    array = zarr.open_group(MemoryStore(objects), mode="w").create_array(
        path, shape=value.shape, chunks=value.shape, dtype=value.dtype, compressors=[Crc32cCodec()], config=EVERY_CHUNK
    )
    array[...] = value
    chunks = {key: data.to_bytes() for key, data in objects.items() if not key.endswith(METADATA)}
    return encode_metadata(objects) | chunks


def encode_groups(paths: Iterable[str]) -> dict[str, bytes]:
    """The zarr.json of the groups around small arrays, by key; not the root's."""
    objects: dict[str, Any] = {}
    root = zarr.open_group(MemoryStore(objects), mode="w")
    for group in {path.rpartition("/")[0] for path in paths}:
        root.require_group(group)
    return encode_metadata(objects)


def encode_metadata(objects: dict[str, Any]) -> dict[str, bytes]:
    """The zarr.json of arrays in zarr's memory, and of the groups around them; not the root's."""
    return {key: objects[key].to_bytes() for key in sorted(objects) if key.endswith(f"/{METADATA}")}


def write_constant(storage: Storage, path: str, value: NDArray[np.generic]) -> None:
    """Write a small array, replacing one that is there."""
    objects = encode_constant(path, value)
    write_metadata(storage, {key: data for key, data in objects.items() if key.endswith(METADATA)})
    for key, data in objects.items():
        if not key.endswith(METADATA):
            storage.write(key, data)


def write_metadata(storage: Storage, metadata: Mapping[str, bytes]) -> None:
    """Write zarr.json objects where they are not there yet, or say something else."""
    for key, data in metadata.items():
        if not _says_the_same(storage, key, data):
            storage.write(key, data)


def _says_the_same(storage: Storage, key: str, data: bytes) -> bool:
    try:
        # as JSON: what another version of zarr wrote with other spaces may be under another group's seal
        return bool(parse_json(read_small(storage, key)) == json.loads(data))
    except (FileNotFoundError, ValueError):
        return False


def has_constant(storage: Storage, path: str) -> bool:
    """Whether `write_constant` has finished for this path: its chunk is written last."""
    return len(storage.list(f"{path}/")) > 1


def read_constant(storage: Storage, path: str, spec: ConstantSpec | None = None) -> NDArray[Any]:
    """What `write_constant` wrote; where a layout says what it must be, nothing else is taken.

    It is decoded here: zarr would follow whatever its metadata says, and some filters run code. Memory is that of the
    chunk on the disk, since nothing in it is compressed.

    Raises:
        StoreError: it is missing, damaged, or not what `write_constant` writes.
    """
    try:
        dtype, shape = _parse_metadata(parse_json(read_small(storage, f"{path}/{METADATA}")))
        if spec is not None and (dtype.name, shape) != (spec.dtype, spec.shape):
            raise ValueError(
                f"it has {shape} numbers of {dtype.name}, the manifest implies {spec.shape} of {spec.dtype}"
            )
        key = "/".join([path, "c", *("0" for _ in shape)])
        expected = prod(shape) * dtype.itemsize + _CRC_BYTES
        if (size := storage.size(key)) != expected:
            raise ValueError(f"{key!r} has {size} bytes, {shape} of {dtype} take {expected}")
        data = storage.read(key, expected)
        if google_crc32c.value(data[:-_CRC_BYTES]) != int.from_bytes(data[-_CRC_BYTES:], "little"):
            raise ValueError(f"{key!r} does not match its own checksum")
        value = np.frombuffer(data[:-_CRC_BYTES], dtype=dtype).reshape(shape).copy()
        if spec is not None:
            _check_numbers(value, positive=spec.positive)
        return value
    except (OSError, *NOT_AN_OBJECT) as error:
        raise StoreError(
            f"{storage.location!r} is damaged: {path!r} cannot be read ({error}). Its numbers are needed to code and "
            "decode; restore it from a copy, or delete the store and build it again"
        ) from error


def _check_numbers(value: NDArray[Any], *, positive: bool) -> None:
    wrong = ~np.isfinite(value)
    if positive:
        wrong |= value <= 0
    if wrong.any():
        found = float(value[wrong].flat[0])
        raise ValueError(f"it holds {found!r}, where every number must be finite{' and above 0' if positive else ''}")


def _parse_metadata(metadata: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of a small array from its zarr.json; ValueError if it is no such array.

    Everything that decides how bytes become numbers must be what `encode_constant` writes.
    """
    shape, name = metadata["shape"], metadata["data_type"]
    if not isinstance(shape, list) or not all(type(length) is int and length > 0 for length in shape):
        raise ValueError(f"its shape is {shape!r}")
    if name not in _TYPES:
        raise ValueError(f"its type is {name!r}, which is none of {', '.join(_TYPES)}")
    said = {key: metadata.get(key) for key in (*_AS_WRITTEN, "chunk_grid")}
    grid = {"name": "regular", "configuration": {"chunk_shape": shape}}
    for key, value in {**_AS_WRITTEN, "chunk_grid": grid}.items():
        if said[key] != value and not (key == "storage_transformers" and said[key] is None):
            raise ValueError(f"its {key} is {said[key]!r} instead of {value!r}")
    return np.dtype(name).newbyteorder("<"), tuple(shape)
