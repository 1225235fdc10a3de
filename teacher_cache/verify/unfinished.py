"""What an unfinished group has beside its blocks, compared with what its manifest implies.

Nothing vouches for these objects before the group is sealed, but what they must be is known: the zarr.json of every
array follows from the manifest, and a constant, once it can be read (its chunk has a checksum), is encoded again and
compared byte for byte. Without this a byte changed before the seal would be sealed as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from teacher_cache.contract.manifest import Manifest
from teacher_cache.errors import StoreError
from teacher_cache.format.groups import Group
from teacher_cache.format.protocol import METADATA, ObjectDigest, damage
from teacher_cache.format.small_arrays import encode_constant, encode_groups, read_constant
from teacher_cache.format.writer import GroupWriter
from teacher_cache.storage.base import Storage

_CALIBRATED = ("basis", "mean", "step")


def is_calibrated(manifest: Manifest, path: str) -> bool:
    """Whether a constant is one that calibration has fixed."""
    stream, _, name = path.rpartition("/")
    return stream in manifest.calibration and name in _CALIBRATED


def check_unsealed(
    storage: Storage, group: Group, sizes: Mapping[str, int], vouched: Collection[str]
) -> tuple[dict[str, str], set[str]]:
    """What is wrong with an unfinished group's objects by key, and the keys of all that belong to it.

    `sizes` are the objects of the store, `vouched` those that another group's seal covers.
    """
    found: dict[str, str] = {}
    paths = group.layout.constants
    implied = GroupWriter(storage, group).metadata() | encode_groups(paths)
    # a build writes what is not there; around a constant everything was there before its chunk
    wanted = {key: data for key, data in implied.items() if key in sizes}
    known = set(wanted)
    for path, spec in paths.items():
        keys = {key for key in sizes if key.startswith(f"{path}/")}
        # with its zarr.json alone it is about to be written, unless the manifest says that it has been
        if len(keys) > 1:
            try:
                wanted |= encode_constant(path, read_constant(storage, path, spec))
            except StoreError:
                found[max(keys - {f"{path}/{METADATA}"})] = "cannot be read as the constant that it holds"
        elif is_calibrated(group.manifest, path):
            found[f"{path}/{METADATA}"] = "is missing, or without its numbers"
        known |= keys
    for key, data in wanted.items():
        if key not in vouched and (what := damage(storage, key, ObjectDigest.of(data))) is not None:
            found[key] = what
    return found, known | wanted.keys()
