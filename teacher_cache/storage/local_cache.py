"""Shards, commits and lists of commits of remote stores, kept in a folder of this machine up to a number of bytes.

A copy is named by the SHA-256 of its contents, which the store's seal and commits say. So no request asks whether one
is still right: an object that was replaced has another name, and equal objects of several stores share a copy. What is
read is compared with its name; a damaged copy is deleted, and the object read from its storage again.

Any number of processes and threads may share the folder. One at a time adds to it, under the kernel's lock of the file
`lock`, which also holds the bytes that are there; it first deletes what was read longest ago where there is no room.
Nothing else in the folder is touched. Whoever cannot write to it goes on without keeping.

Cost: reading is one file and one SHA-256, which takes the place of the reader's own. All copies are looked through when
the folder is opened and whenever it is full, after which a tenth of it is free. Nothing is flushed: what a crash
damages is found like any other damage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from teacher_cache.errors import StoreError

_LOCK = "lock"
_PARTIAL = ".partial"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FREED_SHARE = 0.1

_log = logging.getLogger(__name__)


class _Copy(NamedTuple):
    last_read: int
    size: int
    path: Path


class LocalCache:
    """A folder of copies, at most `limit_bytes` of them. Thread-safe.

    Raises:
        StoreError: there can be no such folder.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self._folder = Path(folder)
        self._limit = limit_bytes
        self._broken = threading.Event()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._alone() as lock:
                _write_number(lock, self._make_room(self._limit))
        except OSError as error:
            raise StoreError(
                f"no copies of the store can be kept in {str(folder)!r} ({error.strerror or error}): every epoch would "
                "read all of it from its bucket again; give a folder that may be written"
            ) from error

    def read(self, sha256: str) -> bytes | None:
        """The object with this hash, None if there is no copy of it."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            _log.warning("%s is damaged: the object is read from its storage again", path)
            self._delete(path)
            return None
        with contextlib.suppress(OSError):  # another process may just have deleted it
            os.utime(path, ns=(time.time_ns(),) * 2)
        return data

    def keep(self, sha256: str, data: bytes) -> None:
        """Keep a copy of an object with this hash, if it fits into the bound at all."""
        if len(data) > self._limit or self._broken.is_set():
            return
        try:
            self._add(self._path(sha256), data)
        except OSError as error:
            if not self._broken.is_set():
                self._broken.set()
                _log.warning("no more copies are kept in %s (%s)", self._folder, error.strerror or error)

    def _add(self, path: Path, data: bytes) -> None:
        with self._alone() as lock:
            if path.exists():
                return
            held = _read_number(lock)
            if held is None or held + len(data) > self._limit:
                held = self._make_room(self._limit - max(len(data), int(self._limit * _FREED_SHARE)))
            # before the file: who is killed between the two leaves room unused, not the bound broken
            _write_number(lock, held + len(data))
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(path.name + _PARTIAL)
            partial.write_bytes(data)
            os.utime(partial, ns=(time.time_ns(),) * 2)
            partial.replace(path)

    def _make_room(self, wanted: int) -> int:
        """Delete what was read longest ago until at most `wanted` bytes are there; returns how many are."""
        copies = sorted(self._find())
        held = sum(copy.size for copy in copies)
        for copy in copies:
            if held <= wanted:
                break
            copy.path.unlink(missing_ok=True)
            held -= copy.size
        return held

    def _find(self) -> Iterator[_Copy]:
        """Every copy; what a killed process left half written is deleted."""
        for path in self._folder.glob("[0-9a-f][0-9a-f]/*"):
            if not _SHA256.fullmatch(path.name.removesuffix(_PARTIAL)):
                continue
            if path.name.endswith(_PARTIAL):
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield _Copy(status.st_mtime_ns, status.st_size, path)

    def _delete(self, path: Path) -> None:
        """Delete a copy. Its bytes count until the folder is looked through the next time."""
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int]:
        """Hold the lock, which ends with the process however that ends; gives the open file."""
        lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise StoreError(
                f"{sha256!r} is no SHA-256: a store that names its objects so was damaged, or made to have files "
                "beside the copies read or deleted; do not use it"
            )
        return self._folder / sha256[:2] / sha256


def open_local_cache(folder: str | None, *, gib: float) -> LocalCache | None:
    """A folder of copies, None where none is named.

    Raises:
        StoreError: there can be no such folder.
    """
    return None if folder is None else LocalCache(folder, int(gib * 2**30))


def _read_number(file: int) -> int | None:
    """The number in the file, None where it holds none, such as after a crash."""
    text = os.pread(file, 32, 0)
    return int(text) if text.isdigit() else None


def _write_number(file: int, number: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, str(number).encode("ascii"), 0)
