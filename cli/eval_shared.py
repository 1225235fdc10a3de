"""What the commands of `kdeval` share: printing results, keeping records of them, and errors in writing --out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.errors import SettingsError

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
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def write_record(record: str, path: Path) -> None:
    """Leave a record beside the model that was measured; replaces the one before it whole."""
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(record + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        # the measurement is on the screen already: a directory that cannot be written to is no reason to fail
        print(f"kdeval: the record was not written to {str(path)!r} ({error.strerror})", file=sys.stderr)


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
