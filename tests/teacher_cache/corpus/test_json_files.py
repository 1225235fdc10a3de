"""JSON in every layout, in windows smaller than a record, against the plain parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.corpus import json_files
from teacher_cache.corpus.json_files import read_json
from teacher_cache.errors import CorpusError

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
VALUES = TEXTS | st.none() | st.lists(TEXTS, max_size=3) | st.dictionaries(TEXTS, TEXTS, max_size=2)
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=5)


def records_of(path: Path) -> list[dict]:
    return [record for _, record in read_json(path)]


@settings(max_examples=50)
@given(records=RECORDS, chunk=st.integers(1, 40), ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 2]))
@pytest.mark.parametrize("layout", ["lines", "together", "list"])
def test_every_layout_gives_what_was_written(
    layout: str, records: list, chunk: int, ascii_only: bool, indent: int | None, tmp_path_factory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"{layout}.json"
    written = [json.dumps(record, ensure_ascii=ascii_only, indent=indent) for record in records]
    whole = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    path.write_text(
        {"lines": "\r\n".join(written), "together": "".join(written), "list": f" {whole}\n"}[layout], newline=""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_CHUNK", chunk)
        assert records_of(path) == records


def test_numbers_of_any_size_are_told_from_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1", "a": -1.5e3, "b": %s, "c": NaN, "d": true}\n' % ("1" * 6000))
    [record] = records_of(tmp_path / "a.jsonl")
    assert [key for key, value in record.items() if isinstance(value, str)] == ["text"]


def test_a_list_of_strings_is_a_column_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n"one",\n"two", {"text": "three"}]')
    assert list(read_json(tmp_path / "a.json")) == [(2, {"text": "one"}), (3, {"text": "two"}), (3, {"text": "three"})]


def test_lines_are_those_where_records_begin(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": "1"}\n\n{"a":\n"2"}{"a": "3"}\n')
    assert [line for line, _ in read_json(tmp_path / "a.jsonl")] == [2, 4, 5]


@pytest.mark.parametrize(
    "content, needle",
    [
        ('{"text": "a"}\nnot json\n', "line 2: this is not JSON .*near 'not json"),
        ('{"text": "a"}\n{"text": "b\n{"text": "c"}\n', "line 2: this is not JSON .*control character"),
        ('{"text": "a"}\n{"text": "b"', "line 2: this is not JSON"),
        ('{"text": "a\tb"}\n', "line 1: this is not JSON .*control character"),
        ('"one"\n"two"\n', "line 1: this is no JSON object"),
        ('{"text": "a"}\n12\n', "line 2: this is no JSON object"),
        ('{"text": "a"}\n[1]\n', "line 2: this is no JSON object"),
        ('[{"text": "a"}, ["b"]]', "line 1: the list holds something else"),
        ('[{"text": "a"} {"text": "b"}]', "line 1: .*a comma or the end of the list is missing"),
        ('[{"text": "a"},\n', "line 2: this is not JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', "line 2: the file goes on"),
        ('{"text": "a", "text": "b"}\n', "line 1: an object holds a key twice"),
        ('{"text": "a"}\n\0\n', "line 2: .*NUL"),
        ('{"text": "a"}\n{"b": ' + "[" * 5000 + "]" * 5000 + "}\n", "line 2: .*nested too deeply"),
        ('{"text": "a"}\n{"b": ' + '{"a":' * 90_000, "line 2: .*nested too deeply"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_record_is_refused_with_its_line(content: str, needle: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=needle) as raised:
        records_of(tmp_path / "a.jsonl")
    assert "a.jsonl" in str(raised.value)


def test_an_endless_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MOST_CHARACTERS", 3 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * (9 << 20) + '"}\n')
    with pytest.raises(CorpusError, match="line 2: more than"):
        records_of(tmp_path / "a.jsonl")
