"""A store in a folder: a file for each object, under its key, such as `hidden/4/codes/c/0/0/0`.

Every object is there in full or not at all: a writer that is killed leaves files under temporary names only, which no
reader looks at. Errors of the disk become messages that say what to do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from teacher_cache.disk import NO_SPACE, flush_to_disk, system_error_number
from teacher_cache.errors import SpaceError, StoreError

PARTIAL = ".partial"
"""How names of unfinished files end."""
_PIECE = 2**22
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST}
_LOCKED = {errno.EACCES, errno.EAGAIN}


class LocalStorage:
    """A folder. Files are written under a temporary name, flushed to the disk and renamed."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self._root = Path(location)

    def read(self, key: str) -> bytes:
        with _read_errors(self._root / key):
            return (self._root / key).read_bytes()

    def stream(self, key: str) -> Iterator[bytes]:
        with _read_errors(self._root / key), (self._root / key).open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece

    def size(self, key: str) -> int | None:
        file = self._root / key
        return file.stat().st_size if file.is_file() else None

    def write(self, key: str, data: bytes) -> None:
        with self._replacing(key) as file:
            file.write(data)

    def write_file(self, key: str, source: Path) -> None:
        with self._replacing(key) as file, source.open("rb") as original:
            shutil.copyfileobj(original, file, _PIECE)

    @contextmanager
    def _replacing(self, key: str) -> Iterator[IO[bytes]]:
        target = self._root / key
        with self._explain_errors():
            # deepest first; their names have to reach the disk like the file's
            new = list(takewhile(lambda folder: not folder.exists(), target.parents))
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, suffix=PARTIAL, delete=False) as file:
                written = Path(file.name)
                try:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    written.chmod(0o644)
                    written.replace(target)
                except BaseException:
                    written.unlink(missing_ok=True)
                    raise
            for folder in (target.parent, *(made.parent for made in new)):
                flush_to_disk(folder)

    def delete(self, key: str) -> None:
        with self._explain_errors():
            (self._root / key).unlink(missing_ok=True)

    def list(self, prefix: str = "") -> dict[str, int]:
        top = self._root / prefix.rpartition("/")[0]
        found = {}
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(PARTIAL)]
            for name in files:
                # what a file manager leaves behind is no part of a store
                if name.startswith(".") or name.endswith(PARTIAL):
                    continue
                file = Path(folder) / name
                key = file.relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    found[key] = file.stat().st_size
        return dict(sorted(found.items()))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the kernel's lock on the folder, which ends with the process however that ends.

        File systems that know no locks are not protected.
        """
        with self._explain_errors():
            self._root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _LOCKED:
                    raise StoreError(
                        f"{self.location!r} is being written by another process: two would overwrite each other's "
                        "blocks; wait until it is done, or stop it and run this command again"
                    ) from error
            yield
        finally:
            os.close(descriptor)

    def remove_unfinished(self) -> None:
        with self._explain_errors():
            for path in list(self._root.rglob(f"*{PARTIAL}")):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        with (
            self._explain_errors(),
            tempfile.TemporaryDirectory(dir=self._root, suffix=PARTIAL, ignore_cleanup_errors=True) as folder,
        ):
            yield Path(folder)

    def free_bytes(self) -> int | None:
        folder = self._root.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def folder(self, prefix: str) -> Path:
        return self._root / prefix

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Say what to do when the disk is full or may not be written."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = system_error_number(error)
            if number in NO_SPACE:
                raise SpaceError(
                    f"no space left while writing {self.location!r} ({os.strerror(number)}): committed blocks are safe "
                    "and whole; free some space and run the same command again, it continues there"
                ) from error
            if number in _NOT_WRITABLE:
                raise StoreError(
                    f"cannot write {self.location!r} ({os.strerror(number)}): the store needs a folder that may be "
                    "written; choose another --out or mend its permissions"
                ) from error
            raise


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """A key below what is a file, or that is a folder, is absent; what cannot be read is a message."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(error.filename)) from error
    except OSError as error:
        raise StoreError(
            f"cannot read {str(path)!r} ({error.strerror or error}): nothing can be said of what is in it; mend its "
            "permissions or the disk, or restore the store from a copy"
        ) from error
