"""Which column of a table holds the documents, and the documents in it.

The first of the names in `TEXT_COLUMNS` that is there counts, and must hold strings: where `text` holds lists, or
nothing at all, the table is refused rather than another column read. Without such a name the only column of strings is
taken, and said, if no other column could hold text as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from teacher_cache.corpus.text_files import refuse_line, refuse_zero
from teacher_cache.errors import CorpusError

TEXT_COLUMNS = ("text", "content", "document", "sentence", "article")
"""Names of a column that holds the documents, in upper or lower case; the first that is there counts."""

Record = tuple[int, dict[str, Any]]
"""The line that a record begins at, and its values by column."""
Note = Callable[[str], None]
"""Is told a line that the user should see."""
Kind = Literal["text", "unclear", "empty", "other"]
"""Strings; lists or objects with strings in them; no value; what cannot be text, such as numbers and dates."""

_NAMES = f"{', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}"
_SAMPLE_RECORDS, _SAMPLE_CHARACTERS = 1000, 1 << 20
_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?(Z|[+-]\d\d:?\d\d)?)?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|true|false", re.IGNORECASE)


def no_note(text: str) -> None:
    """A `Note` that says nothing."""


def named_column(columns: Iterable[str], origin: str) -> str | None:
    """The column whose name says that it holds the documents.

    Raises:
        CorpusError: several columns have that name.
    """
    for name in TEXT_COLUMNS:
        found = [column for column in columns if column.strip().casefold() == name]
        if len(found) > 1:
            raise CorpusError(
                f"the corpus {origin!r} has {len(found)} columns of the name {name!r} ({', '.join(found)}): which of "
                "them holds the documents is not said; rename the others"
            )
        if found:
            return found[0]
    return None


def only_column(kinds: Mapping[str, tuple[Kind, str]], origin: str, note: Note) -> str:
    """The only column of strings, given the kind of each column and a word for it.

    Raises:
        CorpusError: there is none, or others could hold the documents as well.
    """
    strings = [column for column, (kind, _) in kinds.items() if kind == "text"]
    unclear = [column for column, (kind, _) in kinds.items() if kind in ("unclear", "empty")]
    if len(strings) == 1 and not unclear:
        note(f"{origin}: documents are read from column {strings[0]!r}, the only one of strings")
        return strings[0]
    columns = ", ".join(f"{column} ({said})" for column, (_, said) in kinds.items())
    raise CorpusError(
        f"the corpus {origin!r} has no text column: its columns are {columns}, and it is not clear which holds the "
        f"documents; name a column of strings {_NAMES}, or keep only one"
    )


# ---- tables with types ----------------------------------------------------------------------------------------------


def text_column(schema: pa.Schema, origin: str, note: Note) -> str:
    """The column of an Arrow table that holds the documents.

    Raises:
        CorpusError: no column, or more than one, could be it, or that named so does not hold strings.
    """
    named = named_column(schema.names, origin)
    if named is None:
        return only_column({field.name: (_arrow_kind(field.type), str(field.type)) for field in schema}, origin, note)
    if not _is_string(schema.field(named).type):
        raise CorpusError(
            f"the corpus {origin!r} has values of type {schema.field(named).type} in its column {named!r}, where "
            "documents are strings; write the text as one string, or rename that column if another holds the documents"
        )
    return named


def _arrow_kind(kind: pa.DataType) -> Kind:
    if _is_string(kind):
        return "text"
    if pa.types.is_null(kind):
        return "empty"
    if isinstance(kind, pa.BaseExtensionType) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "unclear"
    if pa.types.is_nested(kind):
        children = (kind.field(place).type for place in range(kind.num_fields))
        return "unclear" if any(_arrow_kind(child) in ("text", "unclear") for child in children) else "other"
    return "other"


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


# ---- records without types ------------------------------------------------------------------------------------------


def record_texts(path: Path, records: Iterator[Record], kind_of: Callable[[Any], Kind], note: Note) -> Iterator[str]:
    """The text of each record that has one. The first records say which column that is; the others must agree.

    Raises:
        CorpusError: it is not clear which column holds the documents, or a record holds something else there.
    """
    sample = _beginning(records)
    if not sample:
        return
    named = named_column(dict.fromkeys(key for _, record in sample for key in record), str(path))
    column = named or only_column(_sampled_kinds(sample, kind_of), str(path), note)
    found = False
    for line, record in chain(sample, records):
        value = record.get(column)
        if isinstance(value, str):
            _refuse_unreadable(path, line, value)
            found = found or bool(value.strip())
            yield value
        elif value is not None:
            refuse_line(
                path,
                line,
                f"the column {column!r} holds {_say(value)} where documents are strings; write the text as one "
                "string, or rename that column if another holds the documents",
            )
        _refuse_other_text(path, line, record, column, None if named else kind_of)
    if not found:
        raise CorpusError(
            f"the corpus file {str(path)!r} has no text in its column {column!r}, from line {sample[0][0]} to its end: "
            "there is no document in it; put the text there, rename the column if another one holds the documents, or "
            "leave the file out"
        )


def json_kind(value: Any) -> Kind:
    """What a value of a JSON record can be."""
    if isinstance(value, str):
        return "other" if _DATE.fullmatch(value) else "text"
    if isinstance(value, list | dict):
        return "unclear" if _holds_text(value) else "other"
    return "empty" if value is None else "other"


def written_kind(value: Any) -> Kind:
    """What a value of a table can be, where all are written as text."""
    value = value.strip()
    if not value:
        return "empty"
    return "other" if _NUMBER.fullmatch(value) or _DATE.fullmatch(value) else "text"


def _beginning(records: Iterator[Record]) -> list[Record]:
    sample: list[Record] = []
    characters = 0
    for line, record in records:
        sample.append((line, record))
        characters += sum(len(value) for value in record.values() if isinstance(value, str))
        if len(sample) == _SAMPLE_RECORDS or characters > _SAMPLE_CHARACTERS:
            break
    return sample


def _sampled_kinds(sample: Sequence[Record], kind_of: Callable[[Any], Kind]) -> dict[str, tuple[Kind, str]]:
    """The kind of each column, and a word for it: that of its value which is most like text."""
    order = ("text", "unclear", "other", "empty")
    kinds: dict[str, tuple[Kind, str]] = {}
    for _, record in sample:
        for column, value in record.items():
            kind = kind_of(value)
            if column not in kinds or order.index(kind) < order.index(kinds[column][0]):
                kinds[column] = kind, "numbers or dates" if kind == "other" and isinstance(value, str) else _say(value)
    return kinds


def _refuse_other_text(
    path: Path, line: int, record: Mapping[str, Any], column: str, kind_of: Callable[[Any], Kind] | None
) -> None:
    """Refuse text in a column that is not read: by its name it is another source, or, without names, as good a choice.

    `kind_of` is given where names do not say which column holds the documents.
    """
    if kind_of is None and column in record:
        return
    for other, value in record.items():
        by_name = isinstance(value, str) and value.strip() and other.strip().casefold() in TEXT_COLUMNS
        if other != column and (by_name or (kind_of is not None and kind_of(value) in ("text", "unclear"))):
            refuse_line(
                path,
                line,
                f"documents are read from the column {column!r}, but {other!r} holds text as well ({_say(value)}): it "
                f"is not clear which holds the documents; name that column {TEXT_COLUMNS[0]!r} in every record",
            )


def _refuse_unreadable(path: Path, line: int, text: str) -> None:
    """Refuse what only the escapes of JSON can put into a string."""
    if "\0" in text:
        refuse_zero(path, line)
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        refuse_line(
            path,
            line,
            f"the text holds half a character, {text[error.start]!r} (one of two surrogates of UTF-16): tokenizers "
            "take whole ones; mend or leave out the record",
        )


def _holds_text(value: list[Any] | dict[str, Any]) -> bool:
    waiting: list[Any] = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            return True
        if isinstance(value, list | dict):
            waiting.extend(value if isinstance(value, list) else value.values())
    return False


def _say(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    words = {list: "a list", dict: "an object", type(None): "nothing"}
    words |= dict.fromkeys((bool, int, float), "a number or truth value")
    return words.get(type(value), type(value).__name__)
