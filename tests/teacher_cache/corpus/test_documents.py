"""Reading documents: real files of every kind, and what a user sees when there is nothing to read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from teacher_cache.corpus.documents import read_documents, text_column
from teacher_cache.errors import CorpusError

DOCUMENTS = ["first document", 'second, with "quotes" and a comma', "Łódź 東京 \u2028 e\u0301", "NA", "null"]


def text_bytes(documents: list[str]) -> bytes:
    return "".join(f"{document}\n" for document in documents).encode()


def jsonl_bytes(documents: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(documents)).encode()


def csv_bytes(documents: list[str], column: str = "text") -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["id", column])
    writer.writerows(enumerate(documents))
    return buffer.getvalue().encode()


def parquet_bytes(documents: list[str], column: str = "text") -> bytes:
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table({"id": range(len(documents)), column: documents}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", text_bytes(DOCUMENTS)),
        ("a.jsonl", jsonl_bytes(DOCUMENTS)),
        ("a.json", json.dumps([{"text": text} for text in DOCUMENTS]).encode()),
        ("a.csv", csv_bytes(DOCUMENTS)),
        ("a.parquet", parquet_bytes(DOCUMENTS)),
        ("no-suffix", text_bytes(DOCUMENTS)),
        ("brackets [1], comma {x} #?.txt", text_bytes(DOCUMENTS)),
        ("UPPER.CSV", csv_bytes(DOCUMENTS)),
    ],
    ids=["txt", "jsonl", "json", "csv", "parquet", "no suffix", "odd name", "upper case"],
)
def test_every_kind_of_file_gives_the_same_documents(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_documents([str(tmp_path / name)])) == DOCUMENTS
    if not name.endswith(".parquet"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        assert list(read_documents([str(tmp_path / f"{name}.gz")])) == DOCUMENTS


def test_blank_documents_and_outer_white_space_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n  one \r\n\t\r\n\r\ntwo")  # with the byte order mark some editors write
    assert list(read_documents([str(path)])) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": " "}\n{"text": "two\\nlines"}\n')
    assert list(read_documents([str(tmp_path / "a.jsonl")])) == ["one", "two\nlines"]


def test_globs_folders_and_several_specifications_keep_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    assert list(read_documents([str(tmp_path)])) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(read_documents([str(tmp_path / "*.txt")])) == ["a.txt", "b.txt"]
    assert list(read_documents([str(tmp_path / "**" / "*.txt")])) == ["a.txt", "b.txt", "sub/c.txt"]
    specs = [str(tmp_path / "sub/c.txt"), str(tmp_path / "a.txt")]
    assert list(read_documents(specs)) == ["sub/c.txt", "a.txt"]


def test_a_line_of_several_megabytes_is_one_document(tmp_path: Path) -> None:
    novel = "word " * 4_000_000  # 20 MB: more than is read at a time
    (tmp_path / "novel.txt").write_text(f"before\n{novel}\nafter\n")
    before, middle, after = read_documents([str(tmp_path / "novel.txt")])
    assert (before, after) == ("before", "after")
    assert middle == novel.strip()


@pytest.mark.parametrize("column", ["text", "content", "document", "sentence", "article", "Text"])
def test_text_columns_are_found_by_name(column: str) -> None:
    schema = pa.schema([("title", pa.string()), (column, pa.large_string()), ("label", pa.int64())])
    assert text_column(schema, "x") == column


def test_only_column_of_strings_is_the_text() -> None:
    assert text_column(pa.schema([("label", pa.int64()), ("body", pa.string())]), "x") == "body"


def test_no_text_column_names_the_columns() -> None:
    schema = pa.schema([("title", pa.string()), ("body", pa.string()), ("label", pa.int64())])
    with pytest.raises(CorpusError, match=r"'x\.csv'.*title \(string\), body \(string\), label \(int64\)"):
        text_column(schema, "x.csv")
    with pytest.raises(CorpusError, match=r"text \(int64\)"):
        text_column(pa.schema([("text", pa.int64())]), "x.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_empty_files_hold_no_documents(name: str, tmp_path: Path) -> None:
    for content in (b"", b" \n\n"):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert list(read_documents([str(tmp_path / name)])) == []


@pytest.mark.parametrize(
    "name, content, needle",
    [
        ("bin.txt", b"fine\n\x00\x01", r"not text: a NUL byte at byte 5"),
        ("late.txt", b"x" * 3_000_000 + b"\n\x00\n", r"record 2 .* NUL"),
        ("latin.txt", "fine\nnaïve\n".encode("latin-1"), r"not UTF-8 at byte 7"),
        ("latin.csv", "text\nnaïve\n".encode("latin-1"), r"not UTF-8 at byte 7"),
        ("late-latin.txt", b"x" * 3_000_000 + "ïe\n".encode("latin-1"), r"not UTF-8 at byte 3000000"),
        ("cut.txt", "naï".encode()[:-1], r"not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', r"cannot be read \(JSON"),
        ("bad.parquet", b"PAR1 no more", r"cannot be read"),
        ("ragged.csv", b"text,n\na,1\nb,2,3,4\n", r"cannot be read"),
        ("cut.txt.gz", gzip.compress(os.urandom(4000).hex().encode())[:-100], r"cannot be read"),
        ("plain.txt.gz", b"plain\n", r"cannot be read \(Not a gzipped"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(name: str, content: bytes, needle: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=needle) as raised:
        list(read_documents([str(path)]))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="every file is readable for the superuser")
def test_missing_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x\n")
    path.chmod(0)
    with pytest.raises(CorpusError, match=r"secret\.txt.*permission"):
        list(read_documents([str(path)]))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists but cannot be read")
def test_input_output_errors_are_user_errors() -> None:
    with pytest.raises(CorpusError, match=r"/proc/self/mem.*Input/output error"):
        list(read_documents(["/proc/self/mem"]))


@pytest.mark.parametrize("name", ["missing.txt", "*.jsonl", "deep/missing.csv"])
def test_missing_files_are_refused_before_anything_is_read(name: str, tmp_path: Path, tiny_corpus: Path) -> None:
    with pytest.raises(CorpusError, match="no file matches"):
        next(read_documents([str(tiny_corpus), str(tmp_path / name)]))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(CorpusError, match="holds no file to read"):
        list(read_documents([str(tmp_path)]))


@pytest.mark.parametrize("spec", ["no-such-dataset", "someone/no-such-dataset:config:train[:1%]"])
def test_hub_without_network_says_how_to_use_a_file(spec: str) -> None:
    with pytest.raises(
        CorpusError, match=r"check the name and the network, or give the path of a local file"
    ) as raised:
        list(read_documents([spec]))
    assert repr(spec) in str(raised.value)


def test_local_files_leave_nothing_in_the_cache_of_datasets(tmp_path: Path, tiny_corpus: Path) -> None:
    import datasets

    before = set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))
    assert len(list(read_documents([str(tiny_corpus)]))) == 200
    assert set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*")) == before
