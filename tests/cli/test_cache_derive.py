"""`kdcache derive` as a user meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdcache


@pytest.fixture(scope="module")
def source(tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("derive") / "cache.zarr")
    arguments = ["--teacher", str(tiny_teacher("bert")), "--corpus", str(tiny_corpus), "--seq-len", "16"]
    assert kdcache.main(["build", *arguments, "--max-rows", "20", "--out", out]) == 0
    return out


def test_derive_then_verify(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "small.zarr")
    command = ["derive", source, out, "--layers", "4", "--k", "8", "--precision", "nmse:1e-1", "--row-range", "3:"]
    assert kdcache.main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 17 rows, complete. Wrote 17 rows in ")
    assert f"those of {source} " in printed.out
    assert "17 of 20 rows x 16 tokens, 1 blocks" in printed.err
    assert "hidden 4: plain view, nmse:0.1" in printed.err
    assert "logits: topk 8, masked view, root8" in printed.err
    assert kdcache.main(command) == 0
    assert "complete already" in capsys.readouterr().err
    assert kdcache.main(["verify", out, "--deep", "17"]) == 0


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--layers", "1"], ["lacks hidden 1", "It has logits, hidden 2, hidden 3, hidden 4"]),
        (["--k", "65"], ["--k 65 is more than the 64 ids"]),
        (["--precision", "nmse:1e-4"], ["nmse:0.0001 is finer than nmse:0.01"]),
        (["--precision", "float16"], ["for hidden 2", "nmse:X with X above 0.01"]),
        (["--row-range", "20:"], ["--row-range '20:' is not within the 20 rows"]),
    ],
)
def test_what_cannot_be_is_one_message_and_exit_code_1(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], parts: list[str]
) -> None:
    out = tmp_path / "small.zarr"
    assert kdcache.main(["derive", source, str(out), *flags]) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and printed.out == ""
    for part in parts:
        assert part in printed.err
    assert not out.exists()


def test_both_places_are_needed(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        kdcache.main(["derive", source])
    assert stopped.value.code == 2
    assert "DST" in capsys.readouterr().err
