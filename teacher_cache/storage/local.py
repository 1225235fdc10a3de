"""A store in a folder: a file for each object, under its key, such as `hidden/4/codes/c/0/0/0`.

Every object is there in full or not at all: a writer that is killed leaves files under temporary names only, which no
reader looks at. Errors of the disk become messages that say what to do.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from teacher_cache.disk import NO_SPACE, flush_to_disk, system_error_number
from teacher_cache.errors import SpaceError, StoreError
from teacher_cache.storage.keys import check_key, check_prefix, too_large

PARTIAL = ".partial"
"""How names of unfinished files end."""
_PIECE = 2**22
_FOLDERS_REMEMBERED = 4096
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST}
_LOCKED = {errno.EACCES, errno.EAGAIN}


class LocalStorage:
    """A folder. Files are written under a temporary name, flushed to the disk and renamed."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self._root = Path(location)
        self._plain_folder = lru_cache(maxsize=_FOLDERS_REMEMBERED)(self._check_folder)

    def read(self, key: str, most_bytes: int | None = None) -> bytes:
        with self._opened(key) as file:
            if most_bytes is not None and (size := os.fstat(file.fileno()).st_size) > most_bytes:
                raise too_large(size, most_bytes)
            return file.readall()

    def stream(self, key: str) -> Iterator[bytes]:
        with self._opened(key) as file:
            while piece := file.read(_PIECE):
                yield piece

    @contextmanager
    def _opened(self, key: str) -> Iterator[io.FileIO]:
        """An object to read, as `_file` finds it, in fewer system calls: reading many small ones takes their time.

        Raises:
            FileNotFoundError: it is absent.
            StoreError: it may not be read, or does not lie inside the store.
        """
        path = self._root / check_key(key, self.location)
        with _read_errors(path):
            self._plain_folder(key.rpartition("/")[0])
            if not stat.S_ISREG(os.lstat(path).st_mode):
                self._file(key)  # says what it is, but for a folder, which cannot be opened
            with io.FileIO(path) as file:
                yield file

    def _check_folder(self, folder: str) -> None:
        """That none of the folders on the way to this one is a link. Those that were found not to be are remembered."""
        if folder:
            self._plain_folder(folder.rpartition("/")[0])
            _mode_of_no_link(f"{self._root}/{folder}")

    def size(self, key: str) -> int | None:
        file = self._file(key)
        return file.stat().st_size if file.is_file() else None

    def _file(self, key: str) -> Path:
        """Where an object lies, which is inside the store and nowhere else.

        Raises:
            StoreError: the key or a link leads out of it, or something else than a file lies there.
        """
        check_key(key, self.location)
        path = str(self._root)
        for part in key.split("/"):
            path = f"{path}/{part}"
            try:
                mode = _mode_of_no_link(path)
            except (FileNotFoundError, NotADirectoryError):
                return self._root / key
            except OSError as error:
                raise _cannot_read(Path(path), error) from error
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise StoreError(
                f"{path!r} is no file (a pipe, a socket or a device): a store has files only, and reading this "
                "might never end; delete it, or restore the store from a copy"
            )
        return Path(path)

    def write(self, key: str, data: bytes) -> None:
        with self._replacing(key) as file:
            file.write(data)

    def write_file(self, key: str, source: Path) -> None:
        with self._replacing(key) as file, source.open("rb") as original:
            shutil.copyfileobj(original, file, _PIECE)

    @contextmanager
    def _replacing(self, key: str) -> Iterator[IO[bytes]]:
        target = self._file(key)
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
            self._file(key).unlink(missing_ok=True)

    def list(self, prefix: str = "") -> dict[str, int]:
        top = self._root / check_prefix(prefix, self.location).rpartition("/")[0]
        found = {}
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(PARTIAL)]
            for name in files:
                # what a file manager leaves behind is no part of a store
                if name.startswith(".") or name.endswith(PARTIAL):
                    continue
                file = Path(folder) / name
                key = file.relative_to(self._root).as_posix()
                try:
                    status = file.lstat()
                except FileNotFoundError:
                    continue  # another process has deleted it meanwhile
                if stat.S_ISLNK(status.st_mode):
                    raise _leads_elsewhere(file)
                if key.startswith(prefix) and stat.S_ISREG(status.st_mode):
                    found[key] = status.st_size
            for name in folders:
                if (Path(folder) / name).is_symlink():
                    raise _leads_elsewhere(Path(folder) / name)
        return dict(sorted(found.items()))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the kernel's lock on the folder, which ends with the process however that ends.

        File systems that know no locks are not protected.
        """
        with self._explain_errors():
            new = [folder for folder in (self._root, *self._root.absolute().parents) if not folder.exists()]
            self._root.mkdir(parents=True, exist_ok=True)
            for made in new:
                flush_to_disk(made.parent)  # its name must survive a crash like what is in it
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

    def refuse_unwritable(self) -> None:
        """Find out before long work whether a store could be written here, by writing an empty file and deleting it.

        Raises:
            StoreError, SpaceError: it could not.
        """
        with self._explain_errors():
            folder = next(each for each in (self._root, *self._root.absolute().parents) if each.exists())
            with tempfile.NamedTemporaryFile(dir=folder, suffix=PARTIAL):
                pass

    def remove_unfinished(self) -> None:
        with self._explain_errors():
            for path in list(self._root.rglob(f"*{PARTIAL}")):
                if path.is_dir() and not path.is_symlink():
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
        return self._file(prefix.rstrip("/")) if prefix else self._root

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


def _mode_of_no_link(path: str) -> int:
    """What lies there.

    Raises:
        StoreError: a link, wherever it leads.
        OSError: nothing lies there, or it cannot be looked at.
    """
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        raise _leads_elsewhere(Path(path))
    return mode


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
        raise _cannot_read(path, error) from error


def _leads_elsewhere(path: Path) -> StoreError:
    return StoreError(
        f"{str(path)!r} is a link: what a store reads, writes and deletes lies inside its own folder, and this one "
        "leads elsewhere; replace it by what it leads to"
    )


def _cannot_read(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot read {str(path)!r} ({error.strerror or error}): nothing can be said of what is in it; mend its "
        "permissions or the disk, or restore the store from a copy"
    )
