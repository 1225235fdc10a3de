"""How many rows a block has where nobody says it: 64, and more in stores of many rows, which else become many objects.

A block has one object an array, some thirty of them, so that rows in blocks of 64 are about one object in two rows: ten
million rows would be five million objects, which take a file system hours to list and a bucket as many requests to
write. From `MOST_BLOCKS` blocks on their rows double, up to `_LARGEST` and as long as the codes of one block take no
more than `_MOST_BYTES` while they are made. Smaller stores have blocks of 64: the rows of a block decide its bytes.
"""

from __future__ import annotations

from dataclasses import replace

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.streams import vector_streams
from teacher_cache.errors import StoreError
from teacher_cache.format.protocol import METADATA, read_manifest
from teacher_cache.storage.base import Storage

USUAL = 64
MOST_BLOCKS = 4096
_LARGEST = 1024
_MOST_BYTES = 2**31
_VECTOR_BYTES, _ENTRY_BYTES = 2, 4
"""Of a code while its block is made: of a component of a vector (int16), and of an id kept or drawn (int32)."""


def with_block_rows(manifest: Manifest, asked: int | None, storage: Storage) -> Manifest:
    """The manifest with the rows of a block as asked for, else as in the store that is there, else by its size."""
    if asked is None:
        asked = _held(storage) or default_block_rows(manifest)
    return replace(manifest, block_rows=asked)


def _held(storage: Storage) -> int | None:
    """What a store there has; whatever is wrong with it is told when it is opened to be written."""
    try:
        return None if storage.size(METADATA) is None else read_manifest(storage).block_rows
    except (StoreError, OSError):
        return None


def default_block_rows(manifest: Manifest) -> int:
    """Rows of a block of a new store with these rows and targets."""
    rows = USUAL
    while manifest.rows > rows * MOST_BLOCKS and 2 * rows <= min(_LARGEST, _MOST_BYTES // code_bytes(manifest)):
        rows *= 2
    return rows


def code_bytes(manifest: Manifest) -> int:
    """Bytes that the codes of one row take while its block is made, by and large."""
    size = manifest.seq_len
    for stream in vector_streams(manifest):
        size += _VECTOR_BYTES * stream.width * manifest.seq_len * manifest.views_of(stream.view)
    if (logits := manifest.targets.logits) is not None:
        places = manifest.views_of(logits.view) * manifest.places_of(logits.view)
        size += _ENTRY_BYTES * logits.entries * places
    return size
