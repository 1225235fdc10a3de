"""`kdcache build` as a user meets it: exit codes, messages, results on standard output."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """A superuser may write anywhere: this thread gives up the two capabilities that say so."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH in the effective set
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def test_a_store_that_may_not_be_written_is_refused_before_the_text_is_read(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unfinished, or finished and without what is asked for. What has all of it needs no writing, and is read-only."""
    out = tmp_path / "cache.zarr"
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {"--out": str(out)}

    def build(**changes: str) -> int:
        changed = flags | {f"--{name}": value for name, value in changes.items()}
        return kdcache.main(["build", *(word for pair in changed.items() for word in pair)])

    assert build() == 0
    # there is nothing in this text: whoever reads it first says so
    text = {"corpus": str(tmp_path / "no.txt")}
    (tmp_path / "no.txt").touch()
    out.chmod(0o555)
    try:
        with as_an_ordinary_user():
            assert build() == 0
            capsys.readouterr()
            assert build(**text) == 1
            assert "no.txt" in capsys.readouterr().err
            assert build(**text, layers="1,2,3,4") == 1
            assert f"cannot write {str(out)!r} (Permission denied)" in capsys.readouterr().err
        (out / "seal.json").rename(tmp_path / "seal.json")
        with as_an_ordinary_user():
            assert build(teacher="no/such-model") == 1
            assert f"cannot write {str(out)!r} (Permission denied)" in capsys.readouterr().err
    finally:
        out.chmod(0o755)


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
