"""Which objects the seal of a group must list: all that decides how numbers are read, and nobody else vouches for.

Shards are vouched for by commits, and commits by their list. A seal that leaves one of the others out would let it be
changed without a word; a build writes no such seal, another program might.
"""

from __future__ import annotations

from teacher_cache.format.groups import Group
from teacher_cache.format.protocol import METADATA, TEACHER_FILES

UNLISTED = "is not listed in the seal, so that nothing vouches for it"
"""What is wrong with an object of `unlisted`."""


def keys_to_seal(group: Group) -> set[str]:
    """Manifest, list of the teacher's files, and every zarr.json; beside them come the chunks of the constants."""
    keys = {group.prefix + METADATA}
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
