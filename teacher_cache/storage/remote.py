"""A store below a prefix of a bucket: a `Storage` (see `base.py`) over object storage.

Objects of a bucket are whole or not there by nature, so nothing is written under temporary names. What a killed writer
leaves is its lock, which ends by itself, and possibly parts of an unfinished upload, which nobody can read but which
cost: give buckets the rule that aborts incomplete uploads after a day.

Cost: reading an object is one request; a stream takes one more for the size and reads 8 MiB at a time. `folder`
downloads. Requests, their repetition and their errors: `bucket.py`. The lock: `lease.py`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from teacher_cache.disk import NO_SPACE
from teacher_cache.errors import SpaceError
from teacher_cache.storage.bucket import PART, Bucket
from teacher_cache.storage.keys import check_key, check_prefix
from teacher_cache.storage.lease import LEASE_SECONDS, Lease

LOCK = "build.lock"
"""The object that says who writes. It is no part of a store and is not listed."""


class RemoteStorage:
    """Objects below `s3://bucket/prefix`, `gs://…` or `az://…`.

    Raises:
        SettingsError: an environment variable cannot be used.
        StoreError: the address names no object storage.
    """

    def __init__(self, location: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.location = location
        self._bucket = Bucket(location)
        self._lease_seconds = lease_seconds
        self._lease: Lease | None = None

    def read(self, key: str, most_bytes: int | None = None) -> bytes:
        return self._bucket.read(self._checked(key), most_bytes)

    def stream(self, key: str) -> Iterator[bytes]:
        found = self._bucket.measure(self._checked(key))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.location}/{key}")
        size, version = found
        for start in range(0, size, PART):
            yield self._bucket.read_part(key, start, min(start + PART, size), version)

    def size(self, key: str) -> int | None:
        found = self._bucket.measure(self._checked(key))
        return None if found is None else found[0]

    def write(self, key: str, data: bytes) -> None:
        self._ensure_right()
        self._bucket.write(self._checked(key), data)

    def write_file(self, key: str, source: Path) -> None:
        self._ensure_right()
        self._bucket.write(self._checked(key), source)

    def delete(self, key: str) -> None:
        self._ensure_right()
        self._bucket.delete(self._checked(key))

    def list(self, prefix: str = "") -> dict[str, int]:
        found = self._bucket.list(check_prefix(prefix, self.location).rpartition("/")[0])
        return {key: found[key] for key in sorted(found) if key.startswith(prefix) and _belongs(key)}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock object. While somebody else holds it, this waits until that one lets go or proves to live."""
        with Lease(self._bucket, LOCK, self._lease_seconds) as self._lease:
            try:
                yield
            finally:
                self._lease = None

    def _checked(self, key: str) -> str:
        return check_key(key, self.location)

    def _ensure_right(self) -> None:
        if (lease := self._lease) is not None:
            lease.ensure()

    def remove_unfinished(self) -> None:
        """Nothing to do: objects have no unfinished state that could be seen."""

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with _explain_errors(), tempfile.TemporaryDirectory(prefix="kdcache-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def free_bytes(self) -> int | None:
        return None

    def folder(self, prefix: str) -> Path:
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        with _explain_errors():
            top = Path(tempfile.mkdtemp(prefix="kdcache-"))
            weakref.finalize(self, shutil.rmtree, top, ignore_errors=True)
            for key in self.list(below):
                target = top / self._checked(key).removeprefix(below)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    file.writelines(self.stream(key))
        return top


def _belongs(key: str) -> bool:
    """Whether an object is part of a store: not its lock, not hidden, not the mark of an empty folder."""
    return bool(key) and key != LOCK and not any(part.startswith(".") for part in key.split("/"))


@contextmanager
def _explain_errors() -> Iterator[None]:
    """Say what to do when the local disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise SpaceError(
                f"no space left in {tempfile.gettempdir()!r} ({os.strerror(error.errno)}), where files go on their way "
                "from and to object storage: free some space, or set TMPDIR to a larger disk"
            ) from error
        raise
