"""What the commands of `kdeval` share: printing results, keeping records of them, and errors in writing --out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from teacher_cache.disk import NO_SPACE, system_error_number, write_whole
from teacher_cache.errors import SettingsError, SpaceError
from teacher_cache.outside import visible

if TYPE_CHECKING:
    from rich.console import RenderableType


def make_record(evaluation: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `content`, with versions, git revision and command."""
    from student_train.run_files import run_provenance

    return {"evaluation": evaluation, **content, **run_provenance()}


def print_result(tables: Iterable[RenderableType], notes: Iterable[str], *, width: int | None = None) -> None:
    """Tables and what has to be said about them, on standard output."""
    from rich.console import Console

    console = Console(width=width)
    # rich itself would end the process where nobody reads standard output
    with console.capture() as captured:
        for table in tables:
            console.print(table)
        for note in notes:
            console.print(f"note: {visible(note)}", markup=False, highlight=False, soft_wrap=True)
    print(captured.get(), end="")


def deliver(record: str, path: Path, show: Callable[[], None]) -> None:
    """Leave a record beside the model that was measured, and then show it: nothing that is printed can lose it.

    It is shown, too, where it cannot be written.

    Raises:
        SpaceError: the disk is full.
        SettingsError: the folder cannot be written.
    """
    try:
        write_record(record, path)
    finally:
        show()


def write_record(record: str, path: Path) -> None:
    """Write a record; replaces the one before it whole.

    Raises:
        SpaceError: the disk is full.
        SettingsError: the folder cannot be written.
    """
    try:
        write_whole(path, record + "\n")
    except OSError as error:
        kind = SpaceError if system_error_number(error) in NO_SPACE else SettingsError
        raise kind(
            f"the record was not written to {str(path)!r} ({error.strerror}): what was measured stands on standard "
            "output alone, and `kdeval compare` and `kdeval report` will not find it; make room or mend the folder "
            "and run the same command again"
        ) from error


def refuse_unwritable(out: Path) -> None:
    """Ask before the work whether a file can be written.

    Raises:
        SettingsError: it cannot.
    """
    with writes_to(str(out)):
        if out.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder, where a file is to be written")
        TemporaryFile(dir=out.parent).close()


@contextmanager
def writes_to(out: str) -> Iterator[None]:
    """Around everything that writes what `--out` asks for.

    Raises:
        SettingsError: the operating system refuses.
    """
    try:
        yield
    except OSError as error:
        raise SettingsError(
            f"--out {out!r} cannot be written ({error.strerror}): the result would be lost; give a place that can be "
            "written to"
        ) from error
