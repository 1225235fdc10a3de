"""What a seal vouches for byte by byte can still be wrong: objects that were sealed with impossible contents.

Whoever makes a store can seal anything. So the few objects that decide what else is read and how numbers are decoded
are parsed here as readers parse them: the list of the files of the teacher, and every small array of constants. The
zarr.json of an array is compared with what the manifest implies, by which its shards are decoded. Cost: these objects
are read once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from teacher_cache.errors import StoreError
from teacher_cache.format.groups import Group
from teacher_cache.format.protocol import (
    METADATA,
    NOT_AN_OBJECT,
    TEACHER,
    TEACHER_FILES,
    Seal,
    damage,
    read_teacher_files,
)
from teacher_cache.format.small_arrays import read_constant
from teacher_cache.format.writer import GroupWriter
from teacher_cache.storage.base import Storage

_DESCRIBING = ("shape", "data_type", "chunk_grid")
"""What programs write alike into the zarr.json of an array; the rest may differ between versions of zarr."""


def impossible_contents(storage: Storage, group: Group, seal: Seal) -> Iterator[tuple[str, str]]:
    """Keys of sealed objects whose bytes are as they were sealed and whose contents cannot be, and what is wrong."""

    def is_as_sealed(*keys: str) -> bool:
        # a changed byte is found by its hash, and said once
        return all(damage(storage, key, seal.objects[key]) is None for key in keys)

    if TEACHER_FILES in seal.objects and is_as_sealed(TEACHER_FILES):
        yield from _teacher_files(storage, seal)
    for path, spec in group.layout.constants.items():
        keys = [key for key in seal.objects if key.startswith(f"{path}/")]
        try:
            read_constant(storage, path, spec)
        except StoreError as error:
            if keys and is_as_sealed(*keys):
                yield f"{path}/{METADATA}", f"was sealed as what no build writes ({error.__cause__})"
    implied = GroupWriter(storage, group).metadata()
    for key in (f"{path}/{METADATA}" for path in group.arrays):
        if key in seal.objects and is_as_sealed(key) and not _describes(storage.read(key), implied[key]):
            yield key, "was sealed with another shape or type than the manifest implies"


def _teacher_files(storage: Storage, seal: Seal) -> Iterator[tuple[str, str]]:
    try:
        files = read_teacher_files(storage)
    except (OSError, *NOT_AN_OBJECT) as error:
        yield TEACHER_FILES, f"was sealed with contents that cannot be read ({error})"
        return
    if files != {key: digest for key, digest in seal.objects.items() if key.startswith(f"{TEACHER}/")}:
        yield TEACHER_FILES, "lists other files of the teacher, or other hashes of them, than the seal"


def _describes(found: bytes, implied: bytes) -> bool:
    """Whether the zarr.json of an array says what it has to."""
    try:
        have, want = json.loads(found), json.loads(implied)
        return all(have[name] == want[name] for name in _DESCRIBING)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
