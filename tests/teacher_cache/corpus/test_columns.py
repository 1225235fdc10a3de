"""Which column is read, and refusals where another one would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from teacher_cache.corpus.columns import json_kind, named_column, record_texts, text_column, written_kind
from teacher_cache.errors import CorpusError

STRINGS = pa.string()


def texts_of(records: list[dict[str, Any]], kind_of: Any = json_kind) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    return list(record_texts(Path("x.jsonl"), iter(enumerate(records, 1)), kind_of, notes.append)), notes


@pytest.mark.parametrize("column", ["text", "content", "document", "sentence", "article", "Text"])
def test_text_columns_are_found_by_name(column: str) -> None:
    notes: list[str] = []
    schema = pa.schema([("title", STRINGS), (column, pa.large_string()), ("label", pa.int64())])
    assert text_column(schema, "x", notes.append) == column
    assert texts_of([{"title": "a", column: "b"}]) == (["b"], [])
    assert notes == []


@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), STRINGS)], ids=str)
def test_other_forms_of_strings_are_strings(kind: pa.DataType) -> None:
    assert text_column(pa.schema([("title", STRINGS), ("text", kind)]), "x", pytest.fail) == "text"


@pytest.mark.parametrize(
    "beside",
    [pa.int64(), pa.bool_(), pa.timestamp("s"), pa.list_(pa.float32()), pa.struct([("n", pa.int8())])],
    ids=str,
)
def test_only_column_of_strings_is_the_text_and_said(beside: pa.DataType) -> None:
    notes: list[str] = []
    assert text_column(pa.schema([("label", beside), ("body", STRINGS)]), "x.parquet", notes.append) == "body"
    assert notes == ["x.parquet: documents are read from column 'body', the only one of strings"]


@pytest.mark.parametrize(
    "beside",
    [
        pa.list_(STRINGS),
        pa.struct([("en", STRINGS)]),
        pa.list_(pa.struct([("role", STRINGS)])),
        pa.map_(STRINGS, pa.int64()),
        pa.null(),
        pa.binary(),
        pa.json_(),
    ],
    ids=str,
)
def test_what_may_hold_text_is_not_passed_over_for_ids(beside: pa.DataType) -> None:
    with pytest.raises(CorpusError, match=r"no text column: its columns are id \(string\), body"):
        text_column(pa.schema([("id", STRINGS), ("body", beside)]), "x", pytest.fail)
    with pytest.raises(CorpusError, match="in its column 'text', where documents are strings"):
        text_column(pa.schema([("id", STRINGS), ("text", beside)]), "x", pytest.fail)


def test_no_text_column_names_the_columns() -> None:
    schema = pa.schema([("title", STRINGS), ("body", STRINGS), ("label", pa.int64())])
    with pytest.raises(CorpusError, match=r"'x\.csv'.*title \(string\), body \(string\), label \(int64\)"):
        text_column(schema, "x.csv", pytest.fail)
    with pytest.raises(CorpusError, match=r"type int64 in its column 'text'"):
        text_column(pa.schema([("text", pa.int64())]), "x.csv", pytest.fail)


def test_columns_that_differ_in_case_alone_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"2 columns of the name 'text' \(Text, text\)"):
        named_column(["Text", "id", "text"], "x")


def test_other_columns_may_change_their_type() -> None:
    records = [{"text": str(n), "x": n if n < 8000 else [str(n)], f"k{n % 7}": None} for n in range(9000)]
    assert texts_of(records) == ([str(n) for n in range(9000)], [])


def test_empty_and_missing_texts_are_left_out() -> None:
    assert texts_of([{"id": "1"}, {"text": None}, {"text": "a"}, {"id": "2"}]) == (["a"], [])
    assert texts_of([]) == ([], [])


def test_only_column_of_records_is_the_text_and_said() -> None:
    records = [{"body": f"b {n}", "date": "2020-01-01", "vector": [True], "n": True} for n in range(2000)]
    found, notes = texts_of(records)
    assert found == [f"b {n}" for n in range(2000)]
    assert notes == ["x.jsonl: documents are read from column 'body', the only one of strings"]
    rows = [{"n": "-1.5e3", "ok": "True", "day": "2020-01-01", "body": f"b {n}"} for n in range(2000)]
    assert texts_of(rows, written_kind)[0] == [f"b {n}" for n in range(2000)]


@pytest.mark.parametrize(
    "records, needle",
    [
        ([{"id": "a1", "text": ["p one", "p two"]}], "line 1: the column 'text' holds a list"),
        ([{"id": "a1", "text": {"en": "hello"}}], "line 1: the column 'text' holds an object"),
        ([{"text": "a"}] * 5000 + [{"text": True}], "line 5001: the column 'text' holds a number"),
        ([{"id": "a1", "text": None}] * 3, "has no text in its column 'text', from line 1"),
        ([{"id": "a1", "text": " "}] * 3, "has no text in its column 'text', from line 1"),
        ([{"source": "chat", "messages": [{"role": "user"}]}], r"no text column.*source .*messages \(a list\)"),
        ([{"version": "v2.0", "data": [{"title": "T"}]}], "no text column"),
        ([{"id": "a1", "body": None}], r"no text column.*body \(nothing\)"),
        ([{"id": "a1", "body": "b"}], r"no text column.*id \(the string 'a1'\), body \(the string 'b'\)"),
        ([{"n": True}], "no text column"),
        ([{"text": "a"}, {"content": "b"}], "line 2: documents are read from the column 'text', but 'content' holds"),
        ([{"id": "a"}] * 5000 + [{"id": "a", "body": "b"}], "line 5001: documents are read from the column 'id', but"),
        ([{"id": "a"}] * 5000 + [{"id": "a", "parts": ["b"]}], r"line 5001: .*'parts' holds text as well \(a list\)"),
        ([{"text": "a\0"}], "line 1: .*NUL"),
        ([{"text": "a"}, {"text": "b\ud800"}], r"line 2: the text holds half a character, '\\ud800'"),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_records_whose_text_is_not_clear_are_refused(records: list[dict[str, Any]], needle: str) -> None:
    with pytest.raises(CorpusError, match=needle) as raised:
        texts_of(records)
    assert "x.jsonl" in str(raised.value)


def test_a_column_of_numbers_that_becomes_text_is_noticed() -> None:
    rows = [{"id": f"a{n}", "body": str(n) if n < 15_000 else f"document {n}"} for n in range(20_000)]
    with pytest.raises(CorpusError, match="line 15001: documents are read from the column 'id', but 'body'"):
        texts_of(rows, written_kind)
    named = [{"id": row["id"], "text": row["body"]} for row in rows]
    assert texts_of(named, written_kind)[0] == [row["body"] for row in rows]
