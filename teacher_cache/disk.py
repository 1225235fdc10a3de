"""What an operating system says of disks: which error it was, and writing that is safe once it returns."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from pathlib import Path

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a disk, a quota or a file size that is used up."""


_NUMBER_IN_MESSAGE = re.compile(r"os error (\d+)")


def system_error_number(error: Exception) -> int:
    """The operating system's number of an error, 0 if it has none. Libraries written in Rust hand on its text alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _NUMBER_IN_MESSAGE.search(str(error))
    return int(found.group(1)) if found else 0


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in full or not at all: what was there stays until the new one is safe on the disk."""
    # as another process might write the same file, which on another machine may have the same number
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        # there may be no room for it, and a folder may stand in its place
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)
