"""What a store may ask of a folder and of a bucket alike, and which of the two a location names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from teacher_cache.storage.local import LocalStorage

_log = logging.getLogger(__name__)
_REMOTE = re.compile(r"([a-z][a-z0-9+]*)://?")


class Storage(Protocol):
    """Objects by key under one root."""

    location: str
    """The root as the user wrote it."""

    def read(self, key: str, most_bytes: int | None = None) -> bytes:
        """An object; FileNotFoundError if there is none. ValueError, unread, if it has more than `most_bytes`."""

    def stream(self, key: str) -> Iterator[bytes]:
        """An object in pieces; FileNotFoundError if there is none."""

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Write an object; when this returns it is safe, before that it is not there (or still the old one).

        Raises:
            SpaceError: there is no room left.
            StoreError: the place may not be written, or cannot be reached.
        """

    def write_file(self, key: str, source: Path) -> None:
        """`write` from a file."""

    def delete(self, key: str) -> None:
        """Delete an object if it is there."""

    def list(self, prefix: str = "") -> dict[str, int]:
        """Keys that begin with `prefix`, sorted, with sizes. Unfinished and hidden files are left out."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold the only right to write.

        Raises:
            StoreError: somebody else has it.
        """

    def remove_unfinished(self) -> None:
        """Delete what killed writers left under temporary names. Only while `lock` is held."""

    def scratch(self) -> AbstractContextManager[Path]:
        """A local folder for large files that are still being made, on the disk where they are to go if it is local.

        Raises:
            SpaceError: that disk is full.
        """

    def free_bytes(self) -> int | None:
        """Room left, None where there is no limit or no telling."""

    def folder(self, prefix: str) -> Path:
        """The objects below `prefix` as a local folder, which lasts as long as this storage object."""


def open_storage(location: str | Path) -> Storage:
    """The storage that a user's path or address names. Nothing is touched yet.

    Raises:
        StoreError: the address cannot be used.
    """
    _log.info("store %s", location)
    found = _REMOTE.match(str(location))
    if found is None:
        return LocalStorage(location)
    from teacher_cache.storage.remote import RemoteStorage

    # a Path has swallowed one of the slashes
    return RemoteStorage(f"{found.group(1)}://{str(location)[found.end() :].lstrip('/')}")
