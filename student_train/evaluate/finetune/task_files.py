"""Local task files -> records: one mapping of column names to values per example, with the line it stands on.

Read by suffix, each also with .gz: .tsv (tabs, no quoting, as GLUE comes), .csv, .jsonl or .json (one object a line).
For token classification any other file is read as CoNLL columns: one token a line with its tag in the last column,
separated by tabs or single spaces, an empty line after each sentence. Marks of documents (-DOCSTART-), comments before
a sentence (# text = ...) and a first column that counts the words are passed over; WikiANN's language marks before
tokens ("de:Der") are dropped. A file is held in memory as a whole (QQP, the largest here: 0.4 GB). What columns mean is
not known here.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_cache.errors import TaskError

Record = tuple[int, dict[str, Any]]
"""The number of a line (of its last line, where a quoted field spans several) and the values in it by column."""
_Line = tuple[int, list[str]]
"""Number and columns."""
TAG = re.compile(r"O|[BIESLUM]-\S+")
_DOCUMENT = "-DOCSTART-"
_COMMENT = re.compile(r"#( |$)|#(begin|end)( document |$)")
"""The first column, which is all of the line where others have tabs."""
TABLES = (".tsv", ".csv", ".jsonl", ".json")
CONLL_COLUMNS = ("tokens", "ner_tags")
_COUNT = re.compile(r"[0-9]+([-.][0-9]+)?")
"""What CoNLL-U and its kin count words by; a range for words that are two in one, a point for those left out."""
_NO_WORDS = (
    "nothing but numbers in all of the file: they would be learned in place of words; give a file with a word in the "
    "first column of each line, or in the second after a number, and its tag in the last"
)
_LANGUAGE_MARK = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:")


@dataclass(frozen=True)
class TaskFile:
    """A file in memory."""

    path: Path
    text: str
    suffix: str


def read_records(path: Path, *, tokens: bool, headless: Sequence[str] = ()) -> list[Record]:
    """The examples of a file in order.

    `headless` names the columns of a .tsv that comes without a header: it counts if as many columns are there and the
    first line holds none of these names.

    Raises:
        TaskError: the file cannot be read, or a line of it does not fit the others.
    """
    file = _open(path)
    if file.suffix in (".jsonl", ".json"):
        return list(_read_json_lines(file))
    if tokens:
        return list(_read_conll(file))
    if file.suffix == ".tsv":
        return list(_read_tsv(file, headless))
    if file.suffix == ".csv":
        return list(_read_csv(file))
    raise TaskError(
        f"how to read {str(path)!r} cannot be told from its suffix {file.suffix!r}: give a file that ends in "
        f"{', '.join(TABLES)} (or .gz of these)"
    )


def _open(path: Path) -> TaskFile:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.name.endswith(".gz") else content
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TaskError(
            f"{str(path)!r} cannot be read as text ({error}): give a file of UTF-8 text, unpacked or .gz"
        ) from error
    return TaskFile(path, text.replace("\r\n", "\n"), Path(path.name.removesuffix(".gz")).suffix.lower())


def _refuse_line(file: TaskFile, number: int, what: str) -> TaskError:
    return TaskError(f"{str(file.path)!r}, line {number}: {what}")


def _read_tsv(file: TaskFile, headless: Sequence[str]) -> Iterator[Record]:
    # not splitlines(): it also breaks at characters that texts hold, such as U+2028
    lines = [line.split("\t") for line in file.text.split("\n")]
    if lines and len(lines[0]) == len(headless) and not set(lines[0]) & set(headless):
        header, first = list(headless), 0
    else:
        header, first = lines[0], 1
    for number, values in enumerate(lines[first:], first + 1):
        if values != [""]:
            yield number, _fit(file, number, header, values)


def _read_csv(file: TaskFile) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(file.text, newline=""), strict=True)
    try:
        header = next(reader, [])
        for values in reader:
            if values:
                yield reader.line_num, _fit(file, reader.line_num, header, values)
    except csv.Error as error:
        raise _refuse_line(file, reader.line_num, f"this is not CSV ({error}); mend the line or its quotes") from error


def _fit(file: TaskFile, number: int, header: Sequence[str], values: Sequence[str]) -> dict[str, Any]:
    if len(values) != len(header):
        raise _refuse_line(
            file,
            number,
            f"{len(values)} columns where the header has {len(header)} ({', '.join(header)}): which value is which "
            "cannot be told; mend or delete the line",
        )
    return dict(zip(header, values, strict=True))


def _read_json_lines(file: TaskFile) -> Iterator[Record]:
    for number, line in enumerate(file.text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _refuse_line(
                file, number, f"this is not JSON ({error}); give one JSON object on each line"
            ) from error
        if not isinstance(record, dict):
            raise _refuse_line(file, number, f"{line[:80]!r} is no JSON object; give one such as {{...}} on each line")
        yield number, record


def _read_conll(file: TaskFile) -> Iterator[Record]:
    sentences = list(_sentences(file))
    if _are_counts(sentences):
        sentences = list(_sentences(file, column=1))
        if _are_counts(sentences):
            number, words, _ = sentences[0]
            raise _refuse_line(file, number, f"columns 1 and 2 (here {words[0]!r}) hold {_NO_WORDS}")
    marked = all(_LANGUAGE_MARK.match(word) for _, words, _ in sentences for word in words)
    for number, words, tags in sentences:
        plain = [_LANGUAGE_MARK.sub("", word, count=1) for word in words] if marked else words
        yield number, dict(zip(CONLL_COLUMNS, (plain, tags), strict=True))


def _are_counts(sentences: Sequence[tuple[int, list[str], list[str]]]) -> bool:
    return bool(sentences) and all(_COUNT.fullmatch(word) for _, words, _ in sentences for word in words)


def _sentences(file: TaskFile, column: int = 0) -> Iterator[tuple[int, list[str], list[str]]]:
    """Number of the first line, words and tags of each sentence; words stand in `column`, counted from 0."""
    for lines in _paragraphs(file):
        words: list[str] = []
        tags: list[str] = []
        for number, columns in lines:
            if len(columns) < 2:
                raise _refuse_line(
                    file,
                    number,
                    f"{columns[0][:80]!r} has no tag: each line of CoNLL columns has a token first and its tag last, "
                    "with a tab or a space between; an empty line ends a sentence",
                )
            if len(columns) < column + 2:
                raise _refuse_line(file, number, f"column 1 (here {columns[0]!r}) holds {_NO_WORDS}")
            words.append(columns[column])
            tags.append(columns[-1])
        yield lines[0][0], words, tags


def _paragraphs(file: TaskFile) -> Iterator[list[_Line]]:
    """The lines with words, sentence by sentence: up to an empty line, or to the mark of a new document."""
    lines: list[_Line] = []
    for number, line in enumerate([*file.text.split("\n"), ""], 1):
        if line.strip() and not line.startswith(_DOCUMENT):
            lines.append((number, [part for part in line.split("\t" if "\t" in line else " ") if part]))
        else:
            if words := _without_comments(lines):
                yield words
            lines = []


def _without_comments(lines: list[_Line]) -> list[_Line]:
    """Drop the comments before a sentence.

    The word # may begin a sentence as well: with as many columns as the other lines have, two if all begin so, and a
    tag as the last of them.
    """
    place = next((place for place, (_, columns) in enumerate(lines) if not _COMMENT.match(columns[0])), len(lines))
    width = len(lines[place][1]) if place < len(lines) else 2
    words = [line for line in lines[:place] if len(line[1]) == width and TAG.fullmatch(line[1][-1])]
    return words + lines[place:]
