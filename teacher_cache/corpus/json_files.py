"""JSON files -> records: one object a line, objects one after another, or one list of objects or strings.

Records are taken one at a time from a window of the file that grows with the longest of them, so memory does not grow
with the file, whatever the layout. Every record stands for itself: what type a column has elsewhere is no matter.
Numbers are only told from other values and not kept, unless `numbers` are asked for (arguments of a tool may be some).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from teacher_cache.corpus.columns import Record
from teacher_cache.corpus.text_files import MOST_CHARACTERS, open_text, refuse_length, refuse_line, refuse_zero

_CHUNK = 1 << 20
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16  # an error so close to the end of the window may be a literal or an escape that is cut there


def read_json(path: Path, *, numbers: bool = False) -> Iterator[Record]:
    """The records of a JSON file; a list of strings gives records of a column `text`. With `numbers`, they are kept.

    Raises:
        CorpusError: the file cannot be read, is not JSON, or holds something else than objects.
    """
    with open_text(path, newline=None) as text:
        yield from _Window(path, text, _KEEPING if numbers else _DECODER).records()


class _DuplicateError(Exception):
    """A key stands twice in an object."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _DuplicateError
    return found


# bool is the cheapest function that takes any digits and keeps none of them
_DECODER = json.JSONDecoder(parse_int=bool, parse_float=bool, object_pairs_hook=_without_duplicates)
_MOST_DIGITS = 300  # more are taken for a measurement: Python refuses to read a number of thousands
_KEEPING = json.JSONDecoder(
    parse_int=lambda digits: int(digits) if len(digits) <= _MOST_DIGITS else float(digits),
    object_pairs_hook=_without_duplicates,
)


class _Window:
    """The part of a file in which the next value is looked for."""

    def __init__(self, path: Path, text: TextIO, decoder: json.JSONDecoder) -> None:
        self._path, self._text, self._decoder = path, text, decoder
        self._buffer, self._at = "", 0
        self._line = 1  # of the character at `_at`

    def records(self) -> Iterator[Record]:
        """All records of the file."""
        if self._peek() != "[":
            while self._peek():
                line, value = self._line, self._value()
                if not isinstance(value, dict):
                    self._refuse("this is no JSON object; give an object with its text a line, or one list of objects")
                yield line, value
            return
        self._step()
        if self._peek() == "]":
            self._step()
        else:
            yield from self._elements()
        if self._peek():
            self._refuse("the file goes on after the end of its list; give one list, or one object a line")

    def _elements(self) -> Iterator[Record]:
        while True:
            self._peek()
            line, value = self._line, self._value()
            if not isinstance(value, dict | str):
                self._refuse("the list holds something else than objects and strings; give a list of objects")
            yield line, {"text": value} if isinstance(value, str) else value
            following = self._peek()
            if following not in (",", "]"):
                self._refuse("this is not JSON: a comma or the end of the list is missing; mend or rewrite the file")
            self._step()
            if following == "]":
                return

    def _peek(self) -> str:
        """The next character that is not white space; nothing at the end of the file."""
        while True:
            found = _WHITE_SPACE.match(self._buffer, self._at)
            self._move(found.end() if found else self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read_on():
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._read_on():
                    continue
                near = self._buffer[max(self._at, error.pos - 20) : error.pos + 20]
                refuse_line(
                    self._path,
                    self._line + self._buffer.count("\n", self._at, error.pos),
                    f"this is not JSON ({error.msg.removesuffix(' at')}, near {near!r}); give one JSON object a line, "
                    "or one list of objects",
                )
            except RecursionError:
                self._refuse("its JSON is nested too deeply to be read; leave the nested column out")
            except _DuplicateError:
                self._refuse("an object holds a key twice: which value counts is not said; keep one of them")
            if not isinstance(value, dict | list | str) and end == len(self._buffer) and self._read_on():
                continue  # a number may go on
            self._move(end)
            return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _LONGEST_WORD

    def _read_on(self) -> bool:
        """Make the window larger, twice as large for what is longer than a chunk; False at the end of the file."""
        rest = len(self._buffer) - self._at
        if rest > MOST_CHARACTERS:
            refuse_length(self._path, self._line)
        chunk = self._text.read(max(_CHUNK, rest))
        if not chunk:
            return False
        if "\0" in chunk:
            refuse_zero(self._path, self._line + (self._buffer[self._at :] + chunk).partition("\0")[0].count("\n"))
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        return True

    def _move(self, to: int) -> None:
        self._line += self._buffer.count("\n", self._at, to)
        self._at = to

    def _step(self) -> None:
        self._move(self._at + 1)

    def _refuse(self, what: str) -> NoReturn:
        refuse_line(self._path, self._line, what)
