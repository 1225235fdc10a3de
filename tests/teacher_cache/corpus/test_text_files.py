"""Opening text: what cannot be text, or would fill the memory, is refused with its place."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
from pathlib import Path

import pytest

from teacher_cache.corpus import text_files
from teacher_cache.corpus.text_files import open_text, read_lines
from teacher_cache.errors import CorpusError


def lines_of(path: Path, newline: str | None = None) -> list[tuple[int, str]]:
    with open_text(path, newline=newline) as text:
        return list(read_lines(path, text))


def test_lines_are_numbered_and_keep_their_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree \u2028\x0c\n\nfour".encode())
    assert lines_of(tmp_path / "a.txt") == [
        (1, "one\n"), (2, "two\n"), (3, "three \u2028\x0c\n"), (4, "\n"), (5, "four"),
    ]  # fmt: skip
    assert lines_of(tmp_path / "a.txt", newline="")[:2] == [(1, "one\r\n"), (2, "two\r")]


def test_gz_is_unpacked_and_pipes_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert [line for _, line in lines_of(tmp_path / "a.gz")] == ["one\n", "two\n"]
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", "printf 'one\\ntwo\\n' > \"$0\"", tmp_path / "pipe"]):
        assert [line for _, line in lines_of(tmp_path / "pipe")] == ["one\n", "two\n"]


@pytest.mark.parametrize(
    "name, content, needle",
    [
        ("utf16.txt", "hello\n".encode("utf-16"), "it is UTF-16; .*iconv -f UTF-16"),
        ("utf16-le.txt", "hello\n".encode("utf-16-le"), "line 1: .*NUL"),
        ("latin.txt", "fine\nna\xefve\n".encode("latin-1"), r"at byte 7 \(line 2\)"),
        ("cut.txt", "one\nna\xef".encode()[:-1], r"at byte 6 \(line 2\)"),
        ("late.txt", b"x" * 3_000_000 + b"\n\0\n", "line 2: .*NUL"),
        ("gz.txt", gzip.compress(b"one\n" * 99, mtime=0), "it is packed by gzip; .*unpack"),
        ("zst.txt", b"\x28\xb5\x2f\xfd\xff\xff", "it is packed by zstd"),
        ("plain.gz", b"one\n", "Not a gzipped file"),
        (
            "cut.gz",
            gzip.compress(random.Random(0).randbytes(4000).hex().encode(), mtime=0)[:-100],
            "cannot be read .*complete gzip",
        ),
        ("folder", None, "Is a directory"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_not_text_is_named(name: str, content: bytes | None, needle: str, tmp_path: Path) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=needle) as raised:
        lines_of(tmp_path / name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_pipe_of_other_bytes_is_refused_without_reading_it_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (
        subprocess.Popen(["sh", "-c", "printf 'na\\357ve\\n' > \"$0\"", tmp_path / "pipe"]),
        pytest.raises(CorpusError, match=r"pipe' is not text: bytes that are not UTF-8; give UTF-8"),
    ):
        lines_of(tmp_path / "pipe")


def test_an_endless_line_of_a_small_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(
        gzip.compress(b"fine\n" + bytes(text_files.MOST_CHARACTERS + 1).replace(b"\0", b"a"))
    )
    assert (tmp_path / "bomb.gz").stat().st_size < 100_000
    with pytest.raises(CorpusError, match=r"bomb\.gz', line 2: more than 67108864 characters"):
        lines_of(tmp_path / "bomb.gz")
