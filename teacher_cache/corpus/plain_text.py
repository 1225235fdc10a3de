"""Plain text: every line is a document. Lines that are plainly records of a table are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from teacher_cache.corpus.columns import TEXT_COLUMNS
from teacher_cache.corpus.text_files import open_text, read_lines
from teacher_cache.errors import CorpusError

_LOOKED_AT = 8  # lines that are all JSON objects, or all there are: no prose begins so
_NAME = re.compile(r"[\w.-]*")


def read_plain_text(path: Path) -> Iterator[str]:
    """The lines of a file, each a document; some may be blank.

    Raises:
        CorpusError: the file cannot be read as text, or its lines are records of a table.
    """
    with open_text(path, newline=None) as text:
        lines = (line for _, line in read_lines(path, text))
        head: list[str] = []
        for line in lines:
            if line.strip():
                head.append(line)
            if len(head) == _LOOKED_AT:
                break
        if head:
            _refuse_records(path, head)
        yield from chain(head, lines)


def _refuse_records(path: Path, head: Sequence[str]) -> None:
    """Refuse a table that its name does not show: ids, labels and braces would become text."""
    if all(map(_is_json_object, head)):
        raise CorpusError(
            f"the corpus file {str(path)!r} is read as plain text, a document a line, for its name; but its lines are "
            "JSON objects, which would become documents with their braces; let its name end in .jsonl (or .jsonl.gz), "
            "and write what comes from a pipe to such a file"
        )
    for separator, suffix in (("\t", ".tsv"), (",", ".csv"), (";", ".csv")):
        cells = [cell.strip().strip('"').casefold() for cell in head[0].split(separator)]
        if len(cells) > 1 and set(cells) & set(TEXT_COLUMNS) and all(map(_NAME.fullmatch, cells)):
            raise CorpusError(
                f"the corpus file {str(path)!r} is read as plain text, a document a line, for its name; but its first "
                f"line {head[0].strip()!r} is the header of a table, whose other columns would become text; let its "
                f"name end in {suffix} (or {suffix}.gz), and write what comes from a pipe to such a file"
            )


def _is_json_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
