"""Every command takes s3:// wherever it takes a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cli import kdcache, kdeval, kdtrain

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import S3Server


def test_a_store_in_a_bucket_from_plan_to_student(
    tiny_teacher: Callable[..., Path],
    tiny_corpus: Path,
    s3: S3Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = s3.bucket("commands")
    cache, smaller = f"{bucket}/cache.zarr", f"{bucket}/smaller.zarr"
    flags = ["--teacher", str(tiny_teacher("bert")), "--corpus", str(tiny_corpus), "--out", cache]
    flags += ["--seq-len", "24", "--max-rows", "40", "--block-rows", "16", "--layers", "2,4", "--k", "8"]

    def run(main: Callable[[list[str]], int], *words: str) -> Any:
        assert main(list(words)) == 0, capsys.readouterr().err
        written = capsys.readouterr().out
        return json.loads(written) if "--json" in words else written

    assert run(kdcache.main, "plan", *flags, "--json")["free_bytes"] is None
    run(kdcache.main, "build", *flags)
    assert run(kdcache.main, "info", cache, "--json")["sealed"]
    run(kdcache.main, "verify", cache, "--deep", "4")
    run(kdcache.main, "derive", cache, smaller, "--layers", "2", "--targets", "hidden")
    assert list(run(kdcache.main, "info", smaller, "--json")["bits_per_value"]) == ["hidden/2"]
    student = tmp_path / "student"
    training = ["--method", "hs", "--mapping", "1:2", "--student", "2x32", "--steps", "2", "--batch-size", "8"]
    copies = tmp_path / "copies"
    run(kdtrain.main, "--cache", smaller, *training, "--out", str(student), "--local-cache", str(copies))
    assert len(list(copies.glob("??/*"))) > 3
    run(kdeval.main, "fidelity", "--student", str(student), "--cache", cache)
