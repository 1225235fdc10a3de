"""Keys of objects: relative names that cannot lead out of the store they belong to.

Keys come from files that anybody may have written: a seal lists objects, `teacher.json` lists files. A key that is
absolute, or goes up, would let such a file have other files read, overwritten or deleted. Every storage asks here
before it touches anything.
"""

from __future__ import annotations

from teacher_cache.errors import StoreError


def is_safe_key(key: object) -> bool:
    """Whether this is the name of something inside a store: no empty part, no `.` or `..`, nothing absolute."""
    if not isinstance(key, str) or "\0" in key or "\\" in key:
        return False
    return all(part not in ("", ".", "..") for part in key.split("/"))


def check_key(key: str, location: str) -> str:
    """The key, if it lies inside the store.

    Raises:
        StoreError: it would lead out of the store.
    """
    if not is_safe_key(key):
        raise StoreError(
            f"the name {key!r} in {location!r} does not lie inside the store: one that lists such names was damaged, "
            "or made to have other files of this machine read or deleted, so nothing was touched; do not use it"
        )
    return key


def check_prefix(prefix: str, location: str) -> str:
    """A prefix of keys: the folders in it must lie inside the store; what follows the last `/` may be cut short.

    Raises:
        StoreError: it would lead out of the store.
    """
    folders = prefix.rpartition("/")[0]
    if folders:
        check_key(folders, location)
    return prefix


def too_large(size: int, most_bytes: int | None) -> ValueError:
    """What to raise instead of reading an object that is larger than what it should be."""
    return ValueError(f"it has {size} bytes, where there can be {most_bytes} at most")
