"""Writing into OUT: an error of the operating system becomes a message that says what is safe and how to go on.

Put it around code that writes, and around nothing else: an error in reading a file means something different. It costs
nothing where all goes well.

`hold_folder` lets one process at a time write there. The kernel's lock on a file in the folder ends with the process,
however that ends, so a file that a killed one left behind holds nobody up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path

from safetensors import SafetensorError

from teacher_cache.disk import NO_SPACE, system_error_number
from teacher_cache.errors import SpaceError, TrainingError
from teacher_cache.outside import visible

RUN_LOCK = ".kdtrain.lock"
"""In the folder of a training that is running."""
_MOST_HOLDER_BYTES = 300
_HELD = {errno.EACCES, errno.EAGAIN}
_TORCH_WRITER = re.compile(r"file write|PytorchStreamWriter|inline_container")


def delete_marked(folder: Path, marker: str) -> None:
    """Delete a folder, the file that makes it count first: a deletion that is interrupted leaves nothing whole."""
    (folder / marker).unlink(missing_ok=True)
    shutil.rmtree(folder)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Around everything that writes `path` or into it.

    Raises:
        SpaceError: the disk, the quota or the largest size of a file is used up.
        TrainingError: the operating system refuses to write for another reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_WRITER.search(str(error)):
            raise
        number = system_error_number(error)
        if number in NO_SPACE or isinstance(error, RuntimeError):
            # torch's file writer hides the number of the error: a disk without space is what it mostly means
            reason = os.strerror(number) if number else "PyTorch could not write its file, mostly for want of space"
            raise SpaceError(
                f"no space left while writing {str(path)!r} ({reason}): what is unfinished is never taken for whole, "
                "and complete checkpoints are safe; free some space and run the same command with --resume auto, it "
                "goes on from the newest of them"
            ) from error
        raise TrainingError(
            f"cannot write {str(path)!r} ({os.strerror(number) if number else error}): what is trained has to be kept "
            "there, and complete checkpoints are safe; choose another --out, or mend the folder and run the same "
            "command with --resume auto"
        ) from error


def refuse_file(out: Path) -> None:
    """Refuse what cannot become a folder.

    Raises:
        TrainingError: a file is there, or there can be none of that name.
    """
    try:
        is_file = out.exists() and not out.is_dir()
    except OSError as error:
        raise TrainingError(
            f"--out {str(out)[:200]!r} cannot be a directory ({error.strerror}): nothing could be written; choose "
            "another --out"
        ) from error
    if is_file:
        raise TrainingError(f"--out {str(out)!r} is a file: the student needs a directory; choose another --out")


@contextmanager
def hold_folder(out: Path, name: str) -> Iterator[None]:
    """Be the only process that writes into `out`, until the context is left; `name` is that of the lock's file there.

    The folder is made if need be. The file is deleted at the end, and so are folders that were made and stayed empty.
    File systems that know no locks are not protected.

    Raises:
        TrainingError: another process holds it, which the message names, or the folder cannot be written.
    """
    refuse_file(out)
    new = list(takewhile(lambda folder: not folder.exists(), (out, *out.parents)))
    with explain_write_errors(out):
        descriptor = _lock(out, name)
    try:
        yield
    finally:
        # while it is locked: whoever has opened it meanwhile finds that it is gone, and makes another
        with contextlib.suppress(OSError):
            (out / name).unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()


def is_held(out: Path, name: str) -> bool:
    """Whether a process holds the folder with `hold_folder`, as far as this machine can tell."""
    try:
        descriptor = os.open(out / name, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD
    finally:
        os.close(descriptor)
    return False


def _lock(out: Path, name: str) -> int:
    """The descriptor that holds the lock."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(out / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # the holder before us has just deleted the folder, which was empty
            continue
        try:
            _refuse_second(descriptor, out)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), (out / name).stat()):
                    _name_holder(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder before us has deleted this file


def _refuse_second(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return
        holder = visible(os.pread(descriptor, _MOST_HOLDER_BYTES, 0).decode(errors="replace").strip())
        raise TrainingError(
            f"--out {str(out)!r} is being written by another process{f' ({holder})' if holder else ''}: two would mix "
            "their records and delete each other's checkpoints; wait until it is done, or stop it and run this "
            "command again, or choose another --out"
        ) from error


def _name_holder(descriptor: int) -> None:
    """Say in the file who holds it, for whoever is refused; it matters to nothing else."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
