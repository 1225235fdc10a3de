"""A storage whose writes stay in memory; what was not written here is read from a real one below.

So the code of a build can prepare a draft of a store without touching the store. For small objects such as manifests
and constants: shards and teachers are too large to be kept in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from teacher_cache.storage.base import Storage
from teacher_cache.storage.keys import check_key


class Overlay:
    """A `Storage` on top of another one, which it never changes."""

    def __init__(self, base: Storage) -> None:
        self.location = base.location
        self.written: dict[str, bytes] = {}
        """Objects that were written here, by key."""
        self._base = base
        self._deleted: set[str] = set()

    def added_bytes(self) -> int:
        """How many bytes more the storage would hold."""
        before = (0 if key in self._deleted else self._base.size(key) or 0 for key in self.written)
        return sum(map(len, self.written.values())) - sum(before)

    def added_objects(self) -> int:
        """How many objects more the storage would hold."""
        return sum(key in self._deleted or self._base.size(key) is None for key in self.written)

    def read(self, key: str, most_bytes: int | None = None) -> bytes:
        if key in self.written:
            return self.written[key]
        if key in self._deleted:
            raise FileNotFoundError(key)
        return self._base.read(key, most_bytes)

    def stream(self, key: str) -> Iterator[bytes]:
        if key in self.written or key in self._deleted:
            yield self.read(key)
        else:
            yield from self._base.stream(key)

    def size(self, key: str) -> int | None:
        if key in self.written:
            return len(self.written[key])
        return None if key in self._deleted else self._base.size(key)

    def write(self, key: str, data: bytes) -> None:
        self.written[check_key(key, self.location)] = data

    def write_file(self, key: str, source: Path) -> None:
        self.write(key, source.read_bytes())

    def delete(self, key: str) -> None:
        self.written.pop(key, None)
        self._deleted.add(key)

    def list(self, prefix: str = "") -> dict[str, int]:
        there = {key: size for key, size in self._base.list(prefix).items() if key not in self._deleted}
        new = {key: len(data) for key, data in self.written.items() if key.startswith(prefix)}
        return dict(sorted((there | new).items()))

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext()

    def remove_unfinished(self) -> None:
        """Nothing to do: what killed writers left is for the build that takes the lock."""

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    def free_bytes(self) -> int | None:
        return self._base.free_bytes()

    def folder(self, prefix: str) -> Path:
        return self._base.folder(prefix)
