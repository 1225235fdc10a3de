"""Rows of tables: every value in the column of its header, or a refusal with the line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.corpus.tables import read_csv, read_tsv
from teacher_cache.errors import CorpusError

VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def rows_of(path: Path, content: str) -> list[tuple[int, list[str]]]:
    path.write_text(content, newline="")
    read = read_tsv if path.suffix == ".tsv" else read_csv
    return [(line, list(record.values())) for line, record in read(path)]


@given(
    rows=st.lists(st.tuples(VALUES, VALUES), max_size=6), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_csv_gives_what_was_written(
    separator: str, line_break: str, rows: list, quoting: int, tmp_path_factory
) -> None:
    if quoting == csv.QUOTE_MINIMAL:  # the writer of csv does not quote every line break
        rows = [tuple(value.replace("\n", " ").replace("\r", " ") for value in row) for row in rows]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=separator, lineterminator=line_break, quoting=quoting)
    writer.writerows([("id", "text"), *rows])
    found = rows_of(tmp_path_factory.getbasetemp() / "rows.csv", buffer.getvalue())
    assert [tuple(row) for _, row in found] == [row for row in rows if any(map(str.strip, row))]


def test_rows_are_numbered_by_their_first_line(tmp_path: Path) -> None:
    content = '\ufeff\n\nid,text\n\n1,"a\nb"\n,\n2,c\n'
    assert rows_of(tmp_path / "a.csv", content) == [(5, ["1", "a\nb"]), (8, ["2", "c"])]
    assert rows_of(tmp_path / "a.tsv", 'id\ttext\n\n1\t"a" b\n') == [(3, ["1", '"a" b'])]


def test_a_table_without_rows_is_empty(tmp_path: Path) -> None:
    for content in ("", " \n\n", "id,text\n"):
        assert rows_of(tmp_path / "a.csv", content) == []


@pytest.mark.parametrize(
    "name, content, needle",
    [
        ("first.csv", "id,text\n1,Hello, world again\n2,Second doc\n", "line 2: 3 values where the header has 2"),
        ("trailing.csv", "text,source\nDoc one,web,\nDoc two,book,\n", r"line 2: 3 values .*\(text, source\)"),
        ("late.csv", "id,text\n" + "1,a\n" * 20_000 + "2,b,c\n", "line 20002: 3 values"),
        ("short.csv", "id,text\n1,a\n2\n", "line 3: 1 values"),
        ("backslash.csv", 'id,text\n1,"He said \\"hi, there\\" ok"\n2,b\n', "line 2: this is not CSV .*twice"),
        ("after.csv", 'id,text\n1,"a"b\n', "line 2: this is not CSV"),
        ("open.csv", 'id,text\n1,a\n2,"b\n3,c\n', "line 3: this is not CSV"),
        ("headless.csv", "first doc here\nsecond doc\n", "line 1: the first row 'first doc here' does not look like"),
        ("numbers.csv", "1,first\n2,second\n", "line 1: the first row '1 | first'"),
        ("headless.tsv", "1\tone\n2\ttwo\n", "line 1: the first row"),
        ("twice.csv", "text,Text\na,b\n", r"2 columns of the name 'text' \(text, Text\)"),
        ("first.tsv", "id\ttext\n1\ta\tb\n", "line 2: 3 values"),
        ("quoted.tsv", 'id\ttext\n1\t"a ""b"" c"\n', r"line 2: .*is quoted as in \.csv"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_shifted_and_headless_tables_are_refused(name: str, content: str, needle: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=needle) as raised:
        rows_of(tmp_path / name, content)
    assert name in str(raised.value)


def test_columns_without_a_name_and_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",a,text,a\n0,1,one,2\n")
    assert [record for _, record in read_csv(tmp_path / "a.csv")] == [{"": "0", "a": "1", "text": "one", "a.3": "2"}]
