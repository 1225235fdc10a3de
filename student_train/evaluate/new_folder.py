"""A new folder that is written whole or not at all: beside its place first, then moved there in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from teacher_cache.disk import NO_SPACE, flush_to_disk, system_error_number
from teacher_cache.errors import SettingsError, SpaceError


def check_new_folder(flag: str, out: Path, student: Path) -> None:
    """Refuse a place where a new folder would mix with other files.

    Args:
        flag: what named it, for the message.
        out: the place.
        student: the folder that is read.

    Raises:
        SettingsError: something is there, or it lies inside the student.
    """
    given = f"{flag} {str(out)!r}"
    try:
        taken = (out.exists() or out.is_symlink()) and (not out.is_dir() or any(out.iterdir()))
        inside = out.resolve().is_relative_to(student.resolve())
    except OSError as error:
        raise SettingsError(f"{given} cannot be a folder ({error.strerror}): give another place") from error
    if inside:
        raise SettingsError(
            f"{given} lies inside the student {str(student)!r}: the one would be taken for a part of the other; give a "
            "place outside"
        )
    if taken:
        raise SettingsError(
            f"{given} exists and is no empty folder: what is there would be mixed with what is written; give another "
            "place, or delete it"
        )


@contextmanager
def whole_folder(flag: str, out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the context is left without an error, and nothing otherwise.

    Raises:
        SpaceError: the disk is full.
        SettingsError: it cannot be written for another reason.
    """
    out = out.absolute()
    # of this process, so that a second one that writes the same does not write into this one's
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.rglob("*"):
            flush_to_disk(path)
        flush_to_disk(unfinished)
        unfinished.replace(out)
        flush_to_disk(out.parent)
    except (OSError, SafetensorError) as error:
        number = system_error_number(error)
        kind = SpaceError if number in NO_SPACE else SettingsError
        raise kind(
            f"{flag} {str(out)!r} cannot be written ({os.strerror(number) if number else error}): nothing is left "
            "there; make room, or give a place that can be written to"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
