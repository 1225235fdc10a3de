"""Writing into OUT: an error of the operating system becomes a message that says what is safe and how to go on.

Put it around code that writes, and around nothing else: an error in reading a file means something different. It costs
nothing where all goes well.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from teacher_cache.disk import NO_SPACE, system_error_number
from teacher_cache.errors import SpaceError, TrainingError

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
