"""Lines as documents, and tables that only look like lines."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from teacher_cache.corpus.plain_text import read_plain_text
from teacher_cache.errors import CorpusError


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_every_line_is_given_once(count: int, tmp_path: Path) -> None:
    lines = [f"{number}\n" for number in range(count)]
    (tmp_path / "a.txt").write_text("\n \n".join(lines))
    assert [line for line in read_plain_text(tmp_path / "a.txt") if line.strip()] == lines


@pytest.mark.parametrize(
    "content",
    [
        "{a} or b\n{c}\n",
        '{"text": "one"}\nprose\n',
        "text, content and more\n",
        "sentence\n",
        "Text: one\ttwo\n",
        "a;b\nc\n",
        "[1, 2]\n[3]\n",
        "{" * 5000 + "\n",
        '{"a":' * 5000 + "1" + "}" * 5000 + "\n",
    ],
    ids=lambda value: repr(value)[:30],
)
def test_prose_and_code_are_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert "".join(read_plain_text(tmp_path / "a.txt")) == content


@pytest.mark.parametrize(
    "content, ending",
    [
        ("".join(json.dumps({"text": str(n)}) + "\n" for n in range(9)), ".jsonl"),
        ('\n{"text": "one"}\n', ".jsonl"),
        ("id\ttext\tlabel\n1\tone\t0\n", ".tsv"),
        ("id,text\n1,one\n", ".csv"),
        ('"id";"Text"\n"1";"one"\n', ".csv"),
        (",text\n0,one\n", ".csv"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "no-suffix", "pipe"])
def test_tables_without_their_name_are_refused(name: str, content: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / name
    (tmp_path / "content").write_text(content)
    if name == "pipe":
        os.mkfifo(path)
        with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', tmp_path / "content", path]):
            check_refused(path, ending)
    else:
        path.write_text(content)
        check_refused(path, ending)


def check_refused(path: Path, ending: str) -> None:
    with pytest.raises(CorpusError, match=rf"read as plain text.* name end in \{ending} ") as raised:
        list(read_plain_text(path))
    assert repr(str(path)) in str(raised.value)
