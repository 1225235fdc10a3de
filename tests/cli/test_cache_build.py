"""`kdcache build` as a user meets it: exit codes, messages, results on standard output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdcache


@pytest.fixture(scope="module")
def arguments(tiny_teacher: Callable[..., Path], tiny_corpus: Path) -> list[str]:
    return ["--teacher", str(tiny_teacher("bert")), "--corpus", str(tiny_corpus), "--seq-len", "16", "--max-rows", "20"]


def test_a_build_says_what_it_does_and_once_it_is_done_there_is_nothing_to_do(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "cache.zarr")
    assert kdcache.main(["build", *arguments, "--out", out]) == 0
    printed = capsys.readouterr()
    assert "20 rows, complete" in printed.out
    assert "attention 3: hidden, plain view, nmse:0.01" in printed.err
    assert "calibrating 3 streams on the first 20 rows" in printed.err
    assert kdcache.main(["build", *arguments, "--out", out]) == 0
    assert "complete already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, parts",
    [
        (["--teacher", "no/such-model"], ["'no/such-model' cannot be loaded"]),
        (["--corpus", "no-such-file.txt"], ["no-such-file.txt"]),
        (["--seq-len", "1000"], ["--seq-len 1000", "give at most 64"]),
        (["--layers", "2,77"], ["layer 77"]),
        (["--targets", "logits,smell"], ["'smell'", "logits, hidden, attention"]),
        (["--mlm-probability", "1.5"], ["1.5", "between 0 and 1"]),
        (["--precision", "nmse:2"], ["--precision 'nmse:2'", "nmse:X", "from 1e-06 to 0.5"]),
        (["--relations", "qkv", "--attention-layer", "9"], ["--attention-layer 9"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], parts: list[str]
) -> None:
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True)) | dict(
        zip(changes[::2], changes[1::2], strict=True)
    )
    out = tmp_path / "cache.zarr"
    assert kdcache.main(["build", *(word for pair in flags.items() for word in pair), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    for part in parts:
        assert part in printed.err
    assert printed.out == ""
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_found_before_the_teacher_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is neither a teacher nor a corpus, which would be found first else."""
    (tmp_path / "file").write_text("")
    for place in ("file/cache.zarr", "file"):
        flags = ["--teacher", "no/such-model", "--corpus", "no.txt", "--out", str(tmp_path / place)]
        assert kdcache.main(["build", *flags]) == 1
        assert f"cannot write {str(tmp_path / place)!r} (Not a directory)" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_corpora_that_cannot_be_read(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, each with the store not begun."""
    files = {
        "empty.txt": (b"", "empty"),
        "blank.txt": (b"\n \n", "empty"),
        "binary.txt": (bytes(range(256)) * 40, "binary.txt"),
        "columns.jsonl": (b'{"left": "a", "right": "b"}\n', "left"),
        "numbers.csv": (b"a,b\n1,2\n", "numbers.csv"),
    }
    for name, (data, part) in files.items():
        (tmp_path / name).write_bytes(data)
        flags = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {"--corpus": str(tmp_path / name)}
        out = tmp_path / f"{name}.zarr"
        words = [word for pair in flags.items() for word in pair]
        assert kdcache.main(["build", *words, "--out", str(out)]) == 1, name
        printed = capsys.readouterr().err
        assert part in printed
        assert "Traceback" not in printed
        assert not out.exists()
