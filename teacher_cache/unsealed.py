"""What an unfinished group has beside its blocks, compared with what its manifest implies.

Nothing vouches for these objects before the group is sealed, but what they must be is known: the zarr.json of every
array follows from the manifest, and a constant, once it can be read (its chunk has a checksum), is encoded again and
compared byte for byte. Without this a byte changed before the seal would be sealed as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from teacher_cache.constants import encode_constant, read_constant
from teacher_cache.errors import StoreError
from teacher_cache.groups import Group
from teacher_cache.layout import constant_paths
from teacher_cache.storage import Storage
from teacher_cache.store import GroupWriter


def check_unsealed(
    storage: Storage, group: Group, sizes: Mapping[str, int], vouched: Collection[str]
) -> tuple[dict[str, str], set[str]]:
    """What is wrong with an unfinished group's objects by key, and the keys of all that belong to it.

    `sizes` are the objects of the store, `vouched` those that another group's seal covers.
    """
    found: dict[str, str] = {}
    wanted = GroupWriter(storage, group).metadata()
    known = set(wanted)
    for path in constant_paths(group.manifest):
        keys = {key for key in sizes if key.startswith(f"{path}/")}
        # with its zarr.json alone it is about to be written
        if len(keys) > 1:
            try:
                wanted |= encode_constant(path, read_constant(storage, path))
            except StoreError:
                found[max(keys - {f"{path}/zarr.json"})] = "cannot be read as the constant that it holds"
        known |= keys
    for key, data in wanted.items():
        if key in sizes and key not in vouched and _differs(storage, key, data):
            found[key] = "is not what the manifest implies"
    return found, known | wanted.keys()


def _differs(storage: Storage, key: str, data: bytes) -> bool:
    try:
        return storage.read(key) != data
    except FileNotFoundError:
        return True
