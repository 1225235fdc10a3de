"""Files of records -> one record at a time, by number: lines of JSON, rows of parquet tables.

Opening reads every file once, for the hash of its bytes, and where its lines begin. A line is then read by itself; of a
parquet file a row group at a time is held, which is why rows of one are kept together. Memory: a number a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from teacher_cache.errors import SourceError, first_line
from teacher_cache.importing.source import refuse

Record = Mapping[str, Any]
_MOST_LINE_BYTES = 2**30
"""Of one row: 100,000 tokens with 100 entries each take less."""


def find_files(sources: Sequence[str], suffixes: Sequence[str]) -> tuple[Path, ...]:
    """The files that files, globs and folders name; of a folder all with one of these suffixes, by name.

    Raises:
        SourceError: one names nothing, or a file of another kind.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.is_file() and one.suffix in suffixes)
        elif has_magic(source) and not path.exists():
            inside = [Path(name) for name in sorted(glob(str(path), recursive=True))]  # noqa: PTH207 - absolute too
        else:
            inside = [path] if path.exists() else []
        if not inside:
            raise SourceError(
                f"source {source!r} names no file: there is nothing to import; give {' or '.join(suffixes)} files, a "
                "folder of such, or a pattern in quotes"
            )
        found += inside
    others = [path for path in found if path.suffix not in suffixes]
    if others:
        raise SourceError(
            f"the source file {str(others[0])!r} does not end in {' or '.join(suffixes)}: what it holds is not known; "
            "unpack it if it is compressed, or write it anew as one of these"
        )
    there = [path.resolve() for path in found]
    if len(set(there)) < len(there):
        twice = next(path for path, place in zip(found, there, strict=True) if there.count(place) > 1)
        raise SourceError(f"the source file {str(twice)!r} is named twice: its rows would count twice; name it once")
    return tuple(found)


def unreadable(path: Path, error: Exception) -> SourceError:
    """What to tell of a file that cannot be read."""
    return SourceError(
        f"the source file {str(path)!r} cannot be read ({type(error).__name__}: {first_line(error)}): nothing of it "
        "can be imported; copy or write it again"
    )


def state_of(path: Path) -> tuple[int, int]:
    """What tells a file from one that was written to since: its size, and when it was written.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return found.st_size, found.st_mtime_ns


def refuse_changed(path: Path, state: tuple[int, int]) -> None:
    """Refuse a file that is not what it was when `state_of` said so.

    Raises:
        SourceError: it is not.
    """
    if state_of(path) != state:
        raise SourceError(
            f"the source file {str(path)!r} has changed while it was imported: the store would hold what is of two "
            "sources; let nothing write to it, and import it into another --out"
        )


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


class Records:
    """The records of .jsonl and .parquet files, numbered through."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read every file once.

        Raises:
            SourceError: one cannot be read, or there is no record.
        """
        self.files = tuple(paths)
        parts: list[_Lines | _Table] = [_Lines(one) if one.suffix == ".jsonl" else _Table(one) for one in paths]
        self.hashes = tuple(part.sha256 for part in parts)
        self._parts = [part for part in parts if len(part.unit_R)]
        if not self._parts:
            raise SourceError(
                f"{str(paths[0])!r} and all other files of the source are empty: there is nothing to import; give "
                "files with records"
            )
        self._starts = np.cumsum([0, *(len(part.unit_R) for part in self._parts)])
        self._last = self._parts[0]
        self.unit_R = _number_through(part.unit_R for part in self._parts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, row: int) -> Record:
        """Record `row`, from 0.

        Raises:
            SourceError: it is none.
        """
        part, place = self._find(row)
        if part is not self._last:
            self._last.release()
            self._last = part
        return part.read(place)

    def where(self, row: int) -> str:
        """The file of a record, and its line or number there."""
        part, place = self._find(row)
        return part.where(place)

    def _find(self, row: int) -> tuple[_Lines | _Table, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._parts[number], row - int(self._starts[number])


def _number_through(units: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    numbered, first = [], 0
    for unit_R in units:
        numbered.append(unit_R + first)
        first += int(unit_R.max()) + 1
    return np.concatenate(numbered)


class _Lines:
    """A file with one JSON object a line. Blank lines count as lines and hold nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        digest, starts, lines = hashlib.sha256(), [], []
        try:
            with path.open("rb") as file:
                self._state = state_of(path)
                for number, (start, line) in enumerate(self._scan(file), 1):
                    digest.update(line)
                    if line.strip():
                        starts.append(start)
                        lines.append(number)
        except OSError as error:
            raise unreadable(path, error) from error
        self.sha256 = digest.hexdigest()
        self._start_R, self._line_R = np.array(starts, dtype=np.int64), np.array(lines, dtype=np.int64)
        self.unit_R = np.arange(len(starts))

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        start = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            if len(line) > _MOST_LINE_BYTES:
                refuse(
                    f"the source file {str(self.path)!r}",
                    f"a line from byte {start} on is longer than {_MOST_LINE_BYTES} bytes, which is no row; give one "
                    "JSON object a line",
                )
            yield start, line
            start += len(line)

    def where(self, place: int) -> str:
        return f"the source file {str(self.path)!r}, line {self._line_R[place]}"

    def read(self, place: int) -> Record:
        try:
            with self.path.open("rb") as file:
                refuse_changed(self.path, self._state)
                file.seek(int(self._start_R[place]))
                line = file.readline()
        except OSError as error:
            raise unreadable(self.path, error) from error
        try:
            value = json.loads(line, object_pairs_hook=_once_each)
        except (ValueError, RecursionError) as error:
            refuse(
                self.where(place),
                f"this is no JSON object ({first_line(error)}): what it says cannot be told; give one object a line, "
                "in UTF-8",
            )
        if not isinstance(value, dict):
            refuse(self.where(place), f"a {type(value).__name__} where a record should be; give one JSON object a line")
        return value

    def release(self) -> None:
        """Nothing is held."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds {twice!r} twice")
    return found


class _Table:
    """A parquet file; one row group of it is in memory, and it is open only while that is read."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        self.path = path
        self._state = state_of(path)
        self.sha256 = hash_file(path)
        try:
            with ParquetFile(path) as file:
                groups = file.metadata.num_row_groups
                sizes = [file.metadata.row_group(group).num_rows for group in range(groups)]
        except (ArrowException, OSError) as error:
            raise unreadable(path, error) from error
        self._starts = np.cumsum([0, *sizes])
        self.unit_R = np.repeat(np.arange(groups), sizes)
        self._held: tuple[int, Any] | None = None

    def where(self, place: int) -> str:
        return f"the source file {str(self.path)!r}, row {place}"

    def release(self) -> None:
        """Forget the row group."""
        self._held = None

    def read(self, place: int) -> Record:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        group = int(self.unit_R[place])
        if self._held is None or self._held[0] != group:
            self._held = None  # not two of them at a time
            refuse_changed(self.path, self._state)
            try:
                with ParquetFile(self.path) as file:
                    self._held = group, file.read_row_group(group)
            except (ArrowException, OSError) as error:
                raise unreadable(self.path, error) from error
        table = self._held[1]
        at = place - int(self._starts[group])
        return {name: _value(column[at]) for name, column in zip(table.column_names, table.columns, strict=True)}


def _value(scalar: Any) -> Any:
    """A value of a table; a table of bytes, which would be slow as lists of numbers, as an array where it is whole."""
    import pyarrow

    kind = scalar.type
    if not (pyarrow.types.is_list(kind) and pyarrow.types.is_list(kind.value_type) and scalar.is_valid):
        return scalar.as_py()
    if kind.value_type.value_type != pyarrow.uint8() or scalar.values.null_count:
        return scalar.as_py()
    sizes = scalar.values.value_lengths().to_numpy()
    flat = scalar.values.flatten()
    if not len(sizes) or (sizes != sizes[0]).any() or flat.null_count:
        return scalar.as_py()
    return flat.to_numpy().reshape(len(sizes), -1)
