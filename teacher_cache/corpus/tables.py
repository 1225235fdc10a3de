"""Tables with a header -> records: .csv by commas, semicolons or tabs, with quotes; .tsv by tabs, without quotes.

Every row must have as many values as the header: one that has not is refused, because a shifted row puts another
column's value where the document should be.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from teacher_cache.corpus.columns import TEXT_COLUMNS, Record, named_column
from teacher_cache.corpus.text_files import MOST_CHARACTERS, open_text, read_lines, refuse_length, refuse_line

_SEPARATORS = (",", ";", "\t")
_NAME = re.compile(r"[^\W\d][\w.:/-]*")


def read_csv(path: Path) -> Iterator[Record]:
    """The rows of a .csv file, all values as they are written; quotes as in RFC 4180.

    Raises:
        CorpusError: the file cannot be read, has no header, or a row does not fit it.
    """
    with open_text(path, newline="") as text:
        lines = read_lines(path, text)
        header_line = next(((number, line) for number, line in lines if line.strip()), None)
        if header_line is None:
            return
        # for the whole process: what is refused here would be refused in no other place for its length
        csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARACTERS))
        skipped, first = header_line[0] - 1, header_line[1]
        reader = csv.reader(chain([first], (line for _, line in lines)), delimiter=_separator(first), strict=True)
        yield from _fitting(path, _numbered(path, reader, skipped))


def read_tsv(path: Path) -> Iterator[Record]:
    """The rows of a .tsv file: values between tabs are the text, quotes and all.

    Raises:
        CorpusError: the file cannot be read, has no header, or a row does not fit it.
    """
    with open_text(path, newline=None) as text:
        rows = ((number, line.rstrip("\n").split("\t")) for number, line in read_lines(path, text))
        for line, record in _fitting(path, rows):
            for value in record.values():
                if len(value) > 2 and value[0] == value[-1] == '"' and '""' in value[1:-1]:
                    refuse_line(
                        path,
                        line,
                        f"the value {value[:40]!r} is quoted as in .csv, and values of a .tsv are not; rename the file "
                        "to end in .csv, where tabs may separate values too",
                    )
            yield line, record


def _separator(header: str) -> str:
    """The separator that gives the header a name of a text column, else the first that is in it."""
    for separator in _SEPARATORS:
        if {_plain(cell) for cell in header.split(separator)} & set(TEXT_COLUMNS):
            return separator
    return next((separator for separator in _SEPARATORS if separator in header), ",")


def _plain(cell: str) -> str:
    return cell.strip().strip('"').strip().casefold()


def _numbered(path: Path, reader: Any, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Rows of a csv.reader with the number of their first line."""
    line = skipped + 1
    try:
        for row in reader:
            yield line, row
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            refuse_length(path, line)
        refuse_line(
            path,
            line,
            f"this is not CSV ({error}): where its values end cannot be told; put a value with quotes, separators or "
            'line breaks in quotes, and write a quote in it twice ("")',
        )


def _fitting(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    rows = ((line, row) for line, row in rows if any(map(str.strip, row)))
    line, header = next(rows, (0, []))
    names = _names(path, line, header)
    for line, row in rows:
        if len(row) != len(names):
            refuse_line(
                path,
                line,
                f"{len(row)} values where the header has {len(names)} columns ({', '.join(header)}): which of them is "
                "the document cannot be told; mend or delete the line, and put values with separators in quotes",
            )
        yield line, dict(zip(names, row, strict=True))


def _names(path: Path, line: int, header: Sequence[str]) -> list[str]:
    """The columns. Refuses a first row that may be a document: it would be lost."""
    names = [cell.strip() for cell in header]
    named = named_column(names, str(path))
    index = names[:1] == [""]  # written beside a table without a name, as pandas does
    if named is None and not all(map(_NAME.fullmatch, names[1:] if index else names)):
        refuse_line(
            path,
            line,
            f"the first row {' | '.join(names)[:80]!r} does not look like the names of columns, and would be lost if "
            f"it is a document; put a header above it, with one column named {', '.join(TEXT_COLUMNS[:-1])} or "
            f"{TEXT_COLUMNS[-1]}",
        )
    return [name if name not in names[:place] else f"{name}.{place}" for place, name in enumerate(names)]
