"""Files that hold no records, and files that change; rows of a table are read a group at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from teacher_cache.errors import SourceError
from teacher_cache.importing.files import Records, find_files
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from tests.teacher_cache.importing.samples import Sample, vllm_records, write_jsonl, write_parquet

Asked = Callable[..., ImportSettings]


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no file": (lambda path: path.unlink(), "names no file"),
    "empty": (lambda path: path.write_text("\n\n"), "are empty: there is nothing to import"),
    "no JSON": (
        lambda path: path.write_text("\n{'a': 1}\n"),
        "line 2: this is no JSON object .Expecting property name",
    ),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "line 10: this is no JSON object"),
    "a list": (lambda path: path.write_text("[1]\n"), "line 1: a list where a record should be"),
    "a key twice": (lambda path: path.write_text('{"a": 1, "a": 2}\n'), "line 1: .*an object holds 'a' twice"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}\n'), "line 1: this is no JSON object"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_files_cannot_be(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    change, told = FILES[name]
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    change(path)
    with pytest.raises(SourceError, match=told):
        import_store(asked(path))


def test_a_table_that_is_none_and_files_of_another_kind(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(SourceError, match=r"a\.parquet' cannot be read .ArrowInvalid"):
        import_store(asked(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(SourceError, match="does not end in .jsonl or .parquet.* unpack it"):
        import_store(asked(tmp_path / "a.jsonl.gz"))
    path = write_jsonl(tmp_path / "a.jsonl", vllm_records(sample))
    with pytest.raises(SourceError, match="named twice"):
        import_store(asked(path, path))


def test_records_are_numbered_through_and_groups_kept_together(tmp_path: Path) -> None:
    """Lines and rows by their numbers, whatever order they are asked for in; bytes as an array."""
    rows = [{"a": number, "b": [[number, 1], [2, 3]]} for number in range(7)]
    kind = pyarrow.schema([("a", pyarrow.int64()), ("b", pyarrow.list_(pyarrow.list_(pyarrow.uint8())))])
    (tmp_path / "a.jsonl").write_text('{"a": 0}\n\n  \n{"a": 1}\n{"a": 2}')
    records = Records([tmp_path / "a.jsonl", write_parquet(tmp_path / "b.parquet", rows, group=3, schema=kind)])
    assert len(records) == 10 and records.unit_R.tolist() == [0, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    for number in (9, 1, 4, 0, 2, 5, 3):
        assert records.read(number)["a"] == (number if number < 3 else number - 3)
    assert records.where(1) == f"the source file {str(tmp_path / 'a.jsonl')!r}, line 4"
    assert records.where(4) == f"the source file {str(tmp_path / 'b.parquet')!r}, row 1"
    assert np.array_equal(records.read(6)["b"], np.array([[3, 1], [2, 3]], dtype=np.uint8))


def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 0}\n{"a": 1}\n')
    records = Records([path])
    path.write_text('{"a": 0}\n{"a": 1}\n{"a": 2}\n')
    with pytest.raises(SourceError, match="has changed while it was imported"):
        records.read(0)


def test_a_table_that_is_written_anew_meanwhile_is_refused(tmp_path: Path) -> None:
    rows = [{"a": number} for number in range(6)]
    records = Records([write_parquet(tmp_path / "a.parquet", rows, group=3)])
    assert records.read(0)["a"] == 0
    write_parquet(tmp_path / "a.parquet", [{"a": 10 + number} for number in range(6)], group=3)
    assert records.read(1)["a"] == 1, "the row group is in memory"
    with pytest.raises(SourceError, match="has changed while it was imported"):
        records.read(4)


def test_one_row_group_is_held_whatever_the_number_of_files(tmp_path: Path) -> None:
    """And no file stays open."""
    paths = [write_parquet(tmp_path / f"{number}.parquet", [{"a": number}]) for number in range(20)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    records = Records(paths)
    assert [records.read(number)["a"] for number in range(20)] == list(range(20))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert sum(part._held is not None for part in records._parts) == 1  # type: ignore[union-attr]


def test_a_file_by_two_names_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(SourceError, match="b.jsonl' is named twice|a.jsonl' is named twice"):
        find_files([str(tmp_path)], [".jsonl"])


def test_what_names_files(tmp_path: Path) -> None:
    """Folders, whole; patterns; and files, in the order in which they are named."""
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find_files([str(tmp_path)], [".jsonl"])
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "d.jsonl"]
    found = find_files([str(tmp_path / "b.jsonl"), str(tmp_path / "*" / "*.jsonl")], [".jsonl"])
    assert [path.name for path in found] == ["b.jsonl", "d.jsonl"]
