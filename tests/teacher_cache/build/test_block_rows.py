"""Rows of a block where nobody says them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.build.block_rows import code_bytes, default_block_rows, with_block_rows
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.manifest import Manifest
from teacher_cache.format.protocol import read_manifest
from teacher_cache.read.info import describe_store
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.verify import verify_store

Settings = Callable[..., BuildSettings]


@pytest.fixture(scope="module")
def manifest(small_store: Path) -> Manifest:
    return read_manifest(LocalStorage(small_store))


@pytest.mark.parametrize(
    "rows, expected",
    [
        (1, 64),
        (20_000, 64),
        (262_144, 64),
        (262_145, 128),
        (524_288, 128),
        (2_000_000, 512),
        (10**7, 1024),
        (10**9, 1024),
    ],
)
def test_rows_double_where_there_would_be_too_many_blocks(manifest: Manifest, rows: int, expected: int) -> None:
    assert default_block_rows(replace(manifest, rows=rows)) == expected
    assert rows > 4096 * 1024 or -(-rows // expected) <= 4096


def test_the_codes_of_a_block_have_a_bound(manifest: Manifest) -> None:
    """XLM-R large with nine streams of 512 tokens: a row is 9 MB of codes."""
    wide = replace(manifest, rows=10**7, seq_len=512, teacher=replace(manifest.teacher, hidden_size=1024 * 9 // 2))
    size = code_bytes(wide)
    assert size > 2**31 // 256
    rows = default_block_rows(wide)
    assert rows == 64 or rows * size <= 2**31
    assert default_block_rows(replace(wide, seq_len=8192)) == 64


def test_what_a_store_has_stays_so(small_settings: Settings, small_store: Path, tmp_path: Path) -> None:
    """Blocks of 16 rows, begun with --block-rows 16 and gone on with without it."""
    out = Path(shutil.copytree(small_store, tmp_path / "cache.zarr"))
    report = build_cache(small_settings(out, layers="2,3,4", block_rows=None))
    assert report.computed_rows == 40 and describe_store(out).manifest.block_rows == 16 and verify_store(out).whole


def test_asked_for_is_asked_for(manifest: Manifest, small_store: Path, tmp_path: Path) -> None:
    there, new = LocalStorage(small_store), LocalStorage(tmp_path / "new.zarr")
    assert with_block_rows(manifest, None, there).block_rows == 16
    assert with_block_rows(manifest, 8, there).block_rows == 8
    assert with_block_rows(manifest, None, new).block_rows == 64
    (tmp_path / "new.zarr").mkdir()
    (tmp_path / "new.zarr" / "zarr.json").write_text("{")
    assert with_block_rows(manifest, None, new).block_rows == 64
