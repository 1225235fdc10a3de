"""`kdcache info`: what it says of stores that are whole, unfinished, damaged, or none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import kdcache
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings


@pytest.fixture(scope="module")
def store(tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks of hidden states, attention and logits, and as many of layer 3, which was added later."""
    out = tmp_path_factory.mktemp("info") / "cache.zarr"
    given = {"teacher": str(tiny_teacher("bert")), "corpus": (str(tiny_corpus),), "out": str(out), "device": "cpu"}
    for layers in ("2,4", "2,3,4"):
        build_cache(BuildSettings(**given, seq_len=16, max_rows=20, block_rows=8, layers=layers))  # type: ignore[arg-type]
    return out


def told(store: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert kdcache.main(["info", str(store)]) == 0
    return capsys.readouterr().out


def test_a_whole_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(store, capsys)
    for line in (
        rf"store +{store} \(format 1\), complete",
        r"teacher +.*: bert, 4 layers x 32, 4 heads, 200 ids, weights [0-9a-f]{12}",
        r"rows +20 x 16 tokens, packed, seed 0",
        r"views +plain, masked",
        r"blocks +3 of 8 rows each",
        r"hidden 3 +plain view, nmse:0.01 \(error: 0.01 of the variance on average\)",
        r"logits +topk 64, masked view, root8 \(error: of a probability at most 1.6% near 1.*",
        r"hidden/4 +\d\.\d{3} +0\.0\d+",
        r"hidden/4/codes[^ ]* +[\d,]+ +\d+\.\d\d",
        r"total +[\d,]+ +\d+\.\d\d",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    assert "missing" not in text


def test_for_machines(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kdcache.main(["info", str(store), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["sealed"] is True and info["missing_blocks"] == [] and info["manifest"]["rows"] == 20
    assert "5.1% at 1e-4" in info["declared_errors"]["logits"]
    assert info["total_bytes"] == sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert {"hidden/2", "hidden/3", "hidden/4"} <= info["bits_per_value"].keys()


def test_blocks_that_are_lost_are_named_with_their_targets(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(store, tmp_path / "cache.zarr"))
    for block in ("00000000", "00000001"):
        (damaged / f"extensions/1/commits/{block}.json").unlink()
    text = told(damaged, capsys)
    assert re.search(
        r"^missing +blocks 0-1 of extension 1 \(hidden 3\); lost since: `kdcache verify`", text, re.MULTILINE
    )


def test_an_unfinished_store_is_told_as_such(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = Path(shutil.copytree(store, tmp_path / "cache.zarr"))
    (unfinished / "seal.json").unlink()
    text = told(unfinished, capsys)
    assert "UNFINISHED: repeat the command that made it to complete it" in text
    assert re.search(r"^missing +only its seal of .*logits", text, re.MULTILINE)
    (unfinished / "commits/00000002.json").unlink()
    assert re.search(r"^missing +blocks 2 of .*logits.*\)$", told(unfinished, capsys), re.MULTILINE)


def test_info_of_what_is_not_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kdcache.main(["info", str(tmp_path / "nowhere.zarr")]) == 1
    assert "no store at" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("something else")
    assert kdcache.main(["info", str(tmp_path)]) == 1
    assert "is not a store" in capsys.readouterr().err


def test_a_causal_store(
    causal_teacher: Path, causal_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "cache.zarr")
    build_cache(
        BuildSettings(
            teacher=str(causal_teacher), corpus=(str(causal_corpus),), out=out, seq_len=16, max_rows=8, device="cpu",
            positions="every:4",
        )
    )  # fmt: skip
    text = told(Path(out), capsys)
    for line in (
        r"teacher +.*: llama \(causal LM\), 4 layers x 32",
        r"rows +8 x 16 tokens, packed, documents do not see each other, seed 0",
        r"views +plain$",
        r"places +every:4: the next token after up to 4 of a row",
        r"logits +sample 24, plain view",
        r"segments/starts +\d+",
        r"next/kept +\d+",
    ):
        assert re.search(line, text, re.MULTILINE), line
