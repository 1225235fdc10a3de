"""Small arrays of a store that are not cut into blocks, such as projections: each one uncompressed, checksummed chunk.

zarr encodes and decodes them in memory, so any zarr reader reads them; only whole objects go to and from the storage.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from teacher_cache.errors import StoreError
from teacher_cache.format.protocol import METADATA, NOT_AN_OBJECT
from teacher_cache.storage.base import Storage

if TYPE_CHECKING:
    from zarr.core.array_spec import ArrayConfigLike

EVERY_CHUNK: ArrayConfigLike = {"write_empty_chunks": True}
"""zarr leaves out chunks of zeros otherwise, and reads every chunk that is missing as zeros."""


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
        return bool(json.loads(storage.read(key)) == json.loads(data))
    except (FileNotFoundError, ValueError):
        return False


def has_constant(storage: Storage, path: str) -> bool:
    """Whether `write_constant` has finished for this path: its chunk is written last."""
    return len(storage.list(f"{path}/")) > 1


def read_constant(storage: Storage, path: str) -> NDArray[Any]:
    """What `write_constant` wrote.

    Raises:
        StoreError: it is missing or damaged.
    """
    prototype = default_buffer_prototype()
    try:
        objects = {key: prototype.buffer.from_bytes(storage.read(key)) for key in storage.list(f"{path}/")}
        if len(objects) < 2:
            raise FileNotFoundError(f"{len(objects)} of 2 objects are there")
        return np.asarray(zarr.open_array(MemoryStore(objects), path=path, mode="r")[...])
    except (OSError, *NOT_AN_OBJECT) as error:
        raise StoreError(
            f"{storage.location!r} is damaged: {path!r} cannot be read ({error}). Its numbers are needed to code and "
            "decode; restore it from a copy, or delete the store and build it again"
        ) from error
