"""Which objects the seal of a group must list: all that decides how numbers are read, and nobody else vouches for.

Shards are vouched for by commits, and commits by their list. A seal that leaves one of the others out would let it be
changed without a word; a build writes no such seal, another program might.
"""

from __future__ import annotations

from teacher_cache.format.groups import Group
from teacher_cache.format.protocol import COMMIT_HASHES, METADATA, TEACHER, TEACHER_FILES

UNLISTED = "is not listed in the seal, so that nothing vouches for it"
"""What is wrong with an object of `unlisted`."""
FOREIGN = "is listed in the seal and is part of nothing that the manifest names"
"""What is wrong with an object of `foreign`."""


def keys_to_seal(group: Group) -> set[str]:
    """Manifest, what was given up of it, list of the teacher's files, zarr.json; constants have chunks beside them."""
    keys = {group.prefix + METADATA}
    if group.given_up.key is not None:
        keys.add(group.given_up.key)
    for path in (*group.arrays, *group.layout.constants):
        parts = path.split("/")
        keys |= {"/".join([*parts[:depth], METADATA]) for depth in range(1, len(parts) + 1)}
    return keys if group.prefix else keys | {TEACHER_FILES}


def unlisted(group: Group) -> list[str]:
    """Keys that are lacking in the seal of a group; of a constant without a chunk its folder `c`. None without seal."""
    if group.seal is None:
        return []
    listed = group.seal.objects
    lacking = sorted(keys_to_seal(group) - listed.keys())
    chunks = [f"{path}/c" for path in group.layout.constants]
    return lacking + [key for key in chunks if not any(one == key or one.startswith(f"{key}/") for one in listed)]


def foreign(group: Group) -> list[str]:
    """Keys that the seal of a group lists although its manifest implies no such object. None without seal.

    They are of targets that the manifest has lost: whoever reads the store would be told that it never had them.
    """
    if group.seal is None:
        return []
    known = {*keys_to_seal(group), group.prefix + COMMIT_HASHES}
    folders = tuple(f"{path}/" for path in (TEACHER, *group.layout.constants))
    return sorted(key for key in group.seal.objects.keys() - known if not key.startswith(folders))
