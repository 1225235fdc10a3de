"""Reading documents: real files of every kind, and what a user sees when there is nothing to read."""

from __future__ import annotations

import csv
import errno
import fcntl
import gzip
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from teacher_cache.corpus.documents import look_up, read_documents
from teacher_cache.errors import CorpusError

DOCUMENTS = ["first document", 'second, with "quotes" and a comma', "Łódź 東京 \u2028 e\u0301", "NA", "null"]


def text_bytes(documents: list[str]) -> bytes:
    return "".join(f"{document}\n" for document in documents).encode()


def jsonl_bytes(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)).encode()


def csv_bytes(documents: list[str], separator: str = ",") -> bytes:
    buffer = io.StringIO()
    # a .tsv has no quotes
    quoting = {"quoting": csv.QUOTE_NONE, "quotechar": None} if separator == "\t" else {}
    writer = csv.writer(buffer, delimiter=separator, **quoting)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(documents))
    return buffer.getvalue().encode()


def parquet_bytes(documents: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table({"id": range(len(documents)), "text": documents}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", text_bytes(DOCUMENTS)),
        ("a.jsonl", jsonl_bytes(DOCUMENTS)),
        ("a.json", json.dumps([{"text": text} for text in DOCUMENTS]).encode()),
        ("a.csv", csv_bytes(DOCUMENTS)),
        ("a.tsv", csv_bytes(DOCUMENTS, separator="\t")),
        ("a.parquet", parquet_bytes(DOCUMENTS)),
        ("no-suffix", text_bytes(DOCUMENTS)),
        ("brackets [1], comma {x} #?.txt", text_bytes(DOCUMENTS)),
        ("UPPER.CSV", csv_bytes(DOCUMENTS)),
    ],
    ids=["txt", "jsonl", "json", "csv", "tsv", "parquet", "no suffix", "odd name", "upper case"],
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_empty_files_hold_no_documents(name: str, tmp_path: Path) -> None:
    for content in (b"", b" \n\n"):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert list(read_documents([str(tmp_path / name)])) == []


@pytest.mark.parametrize(
    "name, content, needle",
    [
        ("bin.txt", b"fine\n\x00\x01", r"line 2: this is not text: a NUL character"),
        ("latin.jsonl", '{"text": "a"}\n{"text": "naïve"}\n'.encode("latin-1"), r"not UTF-8 at byte 26 \(line 2\)"),
        ("latin.csv", "text\nnaïve\n".encode("latin-1"), r"not UTF-8 at byte 7 \(line 2\)"),
        ("utf16.csv", "text\none\n".encode("utf-16"), r"it is UTF-16"),
        ("nul.jsonl", b'{"text": "a\\u0000"}\n', r"line 1: .*NUL"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', r"line 2: this is not JSON"),
        ("ids.jsonl", b'{"id": "a1", "text": ["p one", "p two"]}\n', r"line 1: the column 'text' holds a list"),
        ("squad.json", b'{"version": "v2.0", "data": [{"title": "T"}]}', r"no text column"),
        ("bad.parquet", b"PAR1 no more", r"cannot be read as Parquet"),
        ("nul.parquet", parquet_bytes(["one", "a\0b"]), r"record 2 .* NUL"),
        ("lists.parquet", parquet_bytes([["one"]]), r"values of type list<.*> in its column 'text'"),
        ("ragged.csv", b"text,n\na,1\nb,2,3,4\n", r"line 3: 4 values where the header has 2"),
        ("lines.txt", b'{"text": "a"}\n', r"let its name end in \.jsonl"),
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
    before = set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))
    assert len(list(read_documents([str(tiny_corpus)]))) == 200
    assert set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*")) == before


def test_other_columns_may_change_their_type_in_a_large_file(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(9000):
            value: Any = number if number < 8000 else {"deep": [str(number), None]}
            file.write(json.dumps({"text": f"document {number}", "x": value, "filler": "f" * 1500}) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > 13_000_000  # more than one of the parts that datasets reads
    assert list(read_documents([str(tmp_path / "a.jsonl")])) == [f"document {number}" for number in range(9000)]


def test_a_csv_whose_texts_begin_with_numbers_keeps_its_column(tmp_path: Path) -> None:
    texts = [str(n) if n < 11_000 else f"document {n}" for n in range(20_000)]
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"a{n},{text}\n" for n, text in enumerate(texts)))
    assert list(read_documents([str(tmp_path / "a.csv")])) == texts


def test_pipes_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "63")
    with subprocess.Popen(["sh", "-c", "printf 'one\\n\\ntwo\\n' > \"$0\"", tmp_path / "63"]):
        assert list(read_documents([str(tmp_path / "63")])) == ["one", "two"]


def test_saved_datasets_are_loaded(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_dict({"id": ["a", "b"], "text": ["one", None]})
    other = datasets.Dataset.from_dict({"text": ["two"]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": other}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"a": saved, "b": other}).save_to_disk(tmp_path / "others")
    notes: list[str] = []
    assert list(read_documents([str(tmp_path / "one")], notes.append)) == ["one"]
    assert notes == []
    assert list(read_documents([str(tmp_path / "splits")], notes.append)) == ["one"]
    assert notes == [f"{tmp_path}/splits: of its splits train, test, train is read"]
    assert list(read_documents([str(tmp_path / "others" / "b")])) == ["two"]
    with pytest.raises(CorpusError, match=r"several splits \(a, b\), none of them train: .*others/a"):
        list(read_documents([str(tmp_path / "others")]))
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"one' looks like a folder of datasets.save_to_disk and cannot be loaded"):
        list(read_documents([str(tmp_path / "one")]))


def test_folders_and_columns_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "n": 1}\n')
    (tmp_path / "b.md").write_text("two\n")
    notes: list[str] = []
    assert list(read_documents([str(tmp_path)], notes.append)) == ["one"]
    assert notes == [
        f"left out of {tmp_path}: 1 with other endings (b.md)",
        f"{tmp_path}/a.jsonl: documents are read from column 'body', the only one of strings",
    ]


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_local_files_need_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_text('{"text": "two"}\n')
    refuse_locks(monkeypatch, errno.ENOLCK)
    assert list(read_documents([str(tmp_path / "saved"), str(tmp_path / "a.jsonl")])) == ["one", "two"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_cache_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    load = datasets.load_dataset

    def load_local(name: str, config: str | None, split: str, streaming: bool) -> Any:
        """A dataset goes into the cache, but comes from this disk."""
        return load("text", data_files=[str(tmp_path / "a.txt")], split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    refuse_locks(monkeypatch, number)
    with pytest.raises(CorpusError, match=r"'someone/text' cannot be put into the cache .* set HF_DATASETS_CACHE"):
        list(read_documents(["someone/text"]))


@pytest.mark.parametrize("typed", [True, False])
def test_a_streamed_dataset_is_read_no_further_than_its_documents_are(
    typed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def records() -> Iterator[dict[str, Any]]:
        for number in range(10_000):
            given.append(number)
            yield {"n": number, "text": f"text {number}"}

    types = datasets.Features({"n": datasets.Value("int64"), "text": datasets.Value("string")}) if typed else None

    def load(name: str, config: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (name, config, split, streaming) == ("someone/text", "large", "train", True)
        return datasets.IterableDataset.from_generator(records, features=types)

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = read_documents(["someone/text:large"], streamed=True)
    assert [next(documents) for _ in range(40)] == [f"text {number}" for number in range(40)]
    assert len(set(given)) < 100


def test_a_part_of_a_split_cannot_be_streamed() -> None:
    look_up(["someone/text:large:train[:10%]"])
    with pytest.raises(CorpusError, match=r"asks for a part of a split, .* give 'someone/text:large:train', or"):
        look_up(["someone/text:large:train[:10%]"], streamed=True)
