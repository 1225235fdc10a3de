"""Local task files as records by line: every format, what is skipped, and what is refused with its line."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.finetune.task_files import Record, read_records
from teacher_cache.errors import TaskError


@pytest.fixture
def records_of(tmp_path: Path) -> Any:
    """`records_of(name, text, tokens=False, headless=())`: the records of a file of that name."""

    def read(name: str, text: str | bytes, **options: Any) -> list[Record]:
        content = text.encode() if isinstance(text, str) else text
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return read_records(tmp_path / name, **{"tokens": False, **options})

    return read


def test_tables_by_tabs(records_of: Any) -> None:
    """No quoting, lines end at line feeds alone, and numbers of lines count the header and empty lines."""
    text = '\ufeffsentence\tlabel\r\nhe said "no\t0\r\n\r\na\u2028b\t1\r\n'
    expected = [(2, {"sentence": 'he said "no', "label": "0"}), (4, {"sentence": "a\u2028b", "label": "1"})]
    assert records_of("a.tsv", text) == expected
    assert records_of("a.TSV.gz", text) == expected


def test_tables_without_a_header(records_of: Any) -> None:
    headless = ("source", "label", "mark", "sentence")
    rows = "gj04\t1\t\tx .\ngj04\t0\t*\ty .\n"
    assert records_of("cola.tsv", rows, headless=headless) == [
        (1, {"source": "gj04", "label": "1", "mark": "", "sentence": "x ."}),
        (2, {"source": "gj04", "label": "0", "mark": "*", "sentence": "y ."}),
    ]
    # with a header it is one, in whatever order; with other columns too
    header = "sentence\tlabel\tmark\tsource\n"
    assert records_of("a.tsv", header + "x\t1\t\tgj04\n", headless=headless)[0][1]["sentence"] == "x"
    assert records_of("b.tsv", "sentence\tlabel\nx\t1\n", headless=headless) == [(2, {"sentence": "x", "label": "1"})]


def test_comma_separated_values(records_of: Any) -> None:
    """Quoted fields hold commas, quotes and ends of lines; the line is then the last one."""
    text = 'idx,sentence\r\n7,"he said ""no"", twice"\r\n\r\n8,"two\nlines"\r\n'
    assert records_of("a.csv", text) == [
        (2, {"idx": "7", "sentence": 'he said "no", twice'}),
        (5, {"idx": "8", "sentence": "two\nlines"}),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_lines_of_json(records_of: Any, name: str) -> None:
    found = records_of(name, '{"sentence": "x", "label": 1}\n\n{"tokens": ["a"]}')
    assert found == [(1, {"sentence": "x", "label": 1}), (3, {"tokens": ["a"]})]


def test_columns_of_conll(records_of: Any) -> None:
    """Tabs or spaces between, tags last; the number is that of a sentence's first line."""
    text = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nNew York\tB-LOC"
    assert records_of("eng.train", text, tokens=True) == [
        (3, {"tokens": ["EU", "rejects"], "ner_tags": ["B-ORG", "O"]}),
        (7, {"tokens": ["New York"], "ner_tags": ["B-LOC"]}),
    ]


@pytest.mark.parametrize("between", ["\t", " "])
def test_comments_and_marks_of_documents_are_no_words(records_of: Any, between: str) -> None:
    """As CoNLL-U, CoNLL-2003 and CoNLL-2012 have them; a hash that is a word stays one, and so does a hashtag."""
    lines = [
        "# newdoc id = a O", "# text = # Oslo", "1\t#\tO", "2\tOslo\tB-LOC", "", "# a comment of nothing", "",
        "-DOCSTART-\t-X-\tO", "1\t#Oslo\tB-LOC", "-DOCSTART- -X- O O", "#begin document (a/b); part 000", "#",
        "1\tMay\tB-DATE", "#end document", "",
    ]  # fmt: skip
    text = "\n".join(lines[:-2]).replace("\t", between) + "\n"
    assert records_of("train.conll", text, tokens=True) == [
        (3, {"tokens": ["#", "Oslo"], "ner_tags": ["O", "B-LOC"]}),
        (9, {"tokens": ["#Oslo"], "ner_tags": ["B-LOC"]}),
        (13, {"tokens": ["May"], "ner_tags": ["B-DATE"]}),
    ]
    short = f"#{between}O\n# {between}B-LOC\n\n# x y z\n#{between}O\nOslo{between}B-LOC\n".replace("  ", " ")
    found = [record["tokens"] for _, record in records_of("train.txt", short, tokens=True)]
    assert [len(tokens) for tokens in found] == [2, 2] and found[1] == ["#", "Oslo"]


def test_a_column_that_counts_the_words_is_passed_over(records_of: Any) -> None:
    """As CoNLL-U and GermEval have it, from 1 or 0, with ranges; numbers among the words stay words."""
    text = "1 Am an ADP O\n1-2 1996 1996 NUM B-DATE\n\n0 Oslo Oslo PROPN B-LOC\n"
    assert records_of("train.conll", text, tokens=True) == [
        (1, {"tokens": ["Am", "1996"], "ner_tags": ["O", "B-DATE"]}),
        (4, {"tokens": ["Oslo"], "ner_tags": ["B-LOC"]}),
    ]
    assert records_of("train.conll", "1\tO\nx\tO\n", tokens=True)[0][1]["tokens"] == ["1", "x"]


def test_marks_of_a_language_go_where_every_word_has_one(records_of: Any) -> None:
    marked = "zh-yue:a\tO\nzh-yue:b:c\tB-PER\n"
    assert records_of("train", marked, tokens=True)[0][1]["tokens"] == ["a", "b:c"]
    assert records_of("train", marked + "d\tO\n", tokens=True)[0][1]["tokens"] == ["zh-yue:a", "zh-yue:b:c", "d"]


@pytest.mark.parametrize(
    "name, text, tokens, said",
    [
        ("a.tsv", "sentence\tlabel\nx\t1\ny\n", False, r"line 3: 1 columns where the header has 2 \(sentence, label\)"),
        ("a.csv", "sentence,label\nx,y,1\n", False, "line 2: 3 columns where the header has 2"),
        ("a.csv", 'sentence,label\n"x,1\n', False, "line 2: this is not CSV"),
        ("a.jsonl", '{"a": 1}\n{"a"', False, "line 2: this is not JSON"),
        ("a.jsonl", "[1]", False, r"line 1: '\[1\]' is no JSON object"),
        ("a.txt", "EU B-ORG\nPeter\n", True, "line 2: 'Peter' has no tag"),
        ("a.txt", "#Oslo\nEU B-ORG\n", True, "line 1: '#Oslo' has no tag"),
        ("a.conll", "\n1 B-PER\n2 O\n", True, r"line 2: column 1 \(here '1'\) holds nothing but numbers"),
        ("a.conll", "1 x B-PER\n2 O\n", True, r"line 2: column 1 \(here '2'\) holds nothing but numbers"),
        ("a.conll", "1 7 B-PER\n1 8 O\n", True, r"line 1: columns 1 and 2 \(here '7'\) hold nothing but numbers"),
        ("a.txt", "sentence\tlabel\n", False, "from its suffix '.txt'"),
        ("a.tsv", b"caf\xe9\t1\n", False, "cannot be read as text"),
    ],
)
def test_refusals_name_file_and_line(
    records_of: Any, tmp_path: Path, name: str, text: str | bytes, tokens: bool, said: str
) -> None:
    with pytest.raises(TaskError, match=said) as caught:
        records_of(name, text, tokens=tokens)
    assert str(tmp_path / name) in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nowhere.tsv' cannot be read as text"):
        read_records(tmp_path / "nowhere.tsv", tokens=False)
    (tmp_path / "plain.tsv.gz").write_text("sentence\tlabel\n")
    with pytest.raises(TaskError, match="plain.tsv.gz' cannot be read as text.*unpacked or .gz"):
        read_records(tmp_path / "plain.tsv.gz", tokens=False)
