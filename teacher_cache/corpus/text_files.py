"""Files of text, plain or .gz: opened once, decoded strictly, read in bounded memory, every failure named.

A pipe is read like a file. No line may be longer than `MOST_CHARACTERS`, so that a small .gz file that unpacks to one
endless line is refused before it fills the memory. What the lines mean is not known here.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO, cast

from teacher_cache.errors import CorpusError, first_line

MOST_CHARACTERS = 1 << 26
"""Characters of one document, line or record: some hundred novels. Reading one takes a few times as many bytes."""
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip"}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CHUNK = 1 << 20


@contextlib.contextmanager
def open_text(path: Path, *, newline: str | None) -> Iterator[TextIO]:
    """The file as text, unpacked; `newline` as for `open`.

    Raises:
        CorpusError: on opening it or while it is read: it is damaged, not UTF-8, or may not be read.
    """
    try:
        with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise CorpusError(_not_utf_8(path)) from error
    except PermissionError as error:
        raise CorpusError(
            f"the corpus file {str(path)!r} may not be read by this user: permission denied; change its permissions or "
            "copy it"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(
            f"the corpus file {str(path)!r} cannot be read ({first_line(error)}): if it ends in .gz it must be a "
            "complete gzip file; write or copy it again"
        ) from error


def refuse_line(path: Path, line: int, what: str) -> NoReturn:
    """Refuse a file for what is in one line of it.

    Raises:
        CorpusError: always.
    """
    raise CorpusError(f"the corpus file {str(path)!r}, line {line}: {what}")


def refuse_zero(path: Path, line: int) -> NoReturn:
    """Refuse a file that holds a NUL character.

    Raises:
        CorpusError: always.
    """
    refuse_line(
        path,
        line,
        "this is not text: a NUL character is in it; give UTF-8 text (`iconv -f UTF-16 -t UTF-8` converts what is "
        "UTF-16)",
    )


def refuse_length(path: Path, line: int) -> NoReturn:
    """Refuse a file for a line or record that is too long to be one document.

    Raises:
        CorpusError: always.
    """
    refuse_line(
        path,
        line,
        f"more than {MOST_CHARACTERS} characters without an end: this cannot be one document, and would fill the "
        "memory; give one document per line or record",
    )


def read_lines(path: Path, text: TextIO) -> Iterator[tuple[int, str]]:
    """The lines of an open file with their numbers from 1, each with its line break.

    Raises:
        CorpusError: a line is too long or holds a NUL character.
    """
    for number, line in enumerate(iter(partial(text.readline, MOST_CHARACTERS + 1), ""), 1):
        if len(line) > MOST_CHARACTERS:
            refuse_length(path, number)
        if "\0" in line:
            refuse_zero(path, number)
        yield number, line


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _not_utf_8(path: Path) -> str:
    what, where = "bytes that are not UTF-8", ""
    advice = "`iconv -f ENCODING -t UTF-8` converts other encodings"
    if path.is_file():  # a pipe is gone
        with _open(path) as file:
            head = file.read(8)
        packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
        if packed is not None:
            what, advice = f"it is packed by {packed}", "unpack it first, only .gz is unpacked on the fly"
        elif head.startswith(_UTF_16):
            what, advice = "it is UTF-16", "`iconv -f UTF-16 -t UTF-8` converts it"
        else:
            where = " at byte {} (line {})".format(*_first_undecodable(path))
    return f"the corpus file {str(path)!r} is not text: {what}{where}; give UTF-8 text, plain or .gz ({advice})"


def _first_undecodable(path: Path) -> tuple[int, int]:
    """Offset and line of the first byte (of the unpacked file) that cannot be read as UTF-8."""
    decoder, offset, lines = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with _open(path) as file:
        while chunk := file.read(_CHUNK):
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                at = error.start - waiting
                return offset + at, lines + chunk.count(b"\n", 0, max(0, at))
            offset += len(chunk)
            lines += chunk.count(b"\n")
    return offset - len(decoder.getstate()[0]), lines
