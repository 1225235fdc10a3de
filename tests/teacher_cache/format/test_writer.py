"""Nothing half-written is taken for finished, and a full disk is a message, not a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import StoreError
from teacher_cache.format.groups import read_groups
from teacher_cache.format.protocol import Commit, digest_object, read_manifest
from teacher_cache.format.writer import GroupWriter
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from tests.warm.share import Warm

Settings = Callable[..., BuildSettings]


def test_commits_and_seal_cover_every_file(small_store: Path) -> None:
    seal = json.loads((small_store / "seal.json").read_text())
    covered = {"seal.json", *seal["objects"]}
    for number in range(3):
        commit = Commit.from_bytes((small_store / f"commits/{number:08d}.json").read_bytes())
        covered |= {f"commits/{number:08d}.json", *commit.shards}
        for key, digest in commit.shards.items():
            assert digest_object(LocalStorage(small_store), key) == digest
    files = {file.relative_to(small_store).as_posix() for file in small_store.rglob("*") if file.is_file()}
    assert files == covered
    assert seal["blocks"] == 3
    assert len((small_store / "commits.sha256").read_text().splitlines()) == 3
    subprocess.run(["sha256sum", "--check", "--quiet", "commits.sha256"], cwd=small_store, check=True)


@pytest.mark.parametrize("store", ["small_store", "nmse_store"])
def test_manifest_survives_json(store: str, request: pytest.FixtureRequest) -> None:
    manifest = read_manifest(LocalStorage(request.getfixturevalue(store)))
    assert bool(manifest.calibration) == (store == "nmse_store")
    again = type(manifest).from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    assert manifest.differences(again) == []


def test_sealing_refuses_missing_blocks_and_info_names_them(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr")
    build_cache(settings)
    out = Path(settings.out)
    (out / "seal.json").unlink()
    (out / "commits/00000001.json").write_text("{")
    info = describe_store(out)
    assert (info.sealed, info.missing_blocks, info.committed_rows) == (False, (1,), 24)
    with pytest.raises(StoreError, match="lacks 1 of 3 blocks"):
        GroupWriter(LocalStorage(out), read_groups(LocalStorage(out))[0]).seal()
    report = build_cache(settings)
    assert report.computed_rows == 16
    assert describe_store(out).sealed


def test_info_counts_the_bytes_on_disk(small_store: Path) -> None:
    info = describe_store(small_store)
    on_disk = sum(file.stat().st_size for file in small_store.rglob("*") if file.is_file())
    assert info.total_bytes == on_disk
    seal = json.loads((small_store / "seal.json").read_text())
    assert info.bytes_per_array == seal["bytes_per_array"]
    assert info.committed_rows == 40


def test_info_gives_bits_per_value_of_each_stream(small_store: Path, nmse_store: Path) -> None:
    info = describe_store(nmse_store)
    bits = info.bits_per_value()
    assert bits.keys() == info.manifest.calibration.keys() == {"hidden/2", "hidden/4"}
    on_disk = sum(
        file.stat().st_size
        for part in ("codes", "escapes")
        for file in (nmse_store / "hidden/2" / part).rglob("c/**/*")
        if file.is_file()
    )
    assert bits["hidden/2"] == pytest.approx(8 * on_disk / (40 * 24 * 32))
    assert bits["hidden/2"] < describe_store(small_store).bits_per_value()["hidden/2"]
    assert info.to_json()["bits_per_value"] == bits


LOST = ["hidden/2/variance/c", "hidden/2/basis/c/0/0", "input_ids/zarr.json", "teacher/config.json", "teacher.json"]


@pytest.mark.parametrize("key", LOST)
def test_a_store_that_readers_refuse_is_not_called_complete(
    small_settings: Settings, nmse_store: Path, tmp_path: Path, key: str
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", precision="nmse:1e-2", views=2)
    shutil.copytree(nmse_store, settings.out)
    Path(settings.out, key).unlink()
    with pytest.raises(StoreError):
        CacheReader.open(settings.out).teacher_folder()
    with pytest.raises(StoreError, match=f"'{key}' is missing.*kdcache verify --evict"):
        build_cache(settings)
    with pytest.raises(StoreError, match=f"'{key}' is missing"):
        build_cache(small_settings(Path(settings.out), precision="nmse:1e-2", views=2, layers="3"))


FILLER = """
import resource, sys
from teacher_cache.build.build import Silent, build_cache
from teacher_cache.errors import SpaceError
from teacher_cache.read.reader import CacheReader
from teacher_cache.build.settings import BuildSettings

def no_more_space():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

class UntilTheBlocks(Silent):
    def committed(self, rows, total, written):
        no_more_space()

    def note(self, text):
        if sys.argv[2] == "teacher" and "rows x" in text:  # what is announced before the teacher is written
            no_more_space()

if sys.argv[2] == "corpus":
    no_more_space()
try:
    build_cache(eval(sys.argv[1]), UntilTheBlocks())
except SpaceError as error:
    print(error)
    raise SystemExit(9)
"""


@pytest.mark.parametrize("when", ["corpus", "teacher", "blocks"])
def test_a_full_disk_is_a_message_and_the_build_goes_on_later(
    small_settings: Settings, warm: Warm, tmp_path: Path, when: str
) -> None:
    """A limit on file size gives the operating system's own error in the midst of a write, as a full disk does."""
    settings = small_settings(tmp_path / "cache.zarr", block_rows=40)
    out = Path(settings.out)
    command = [*warm.python, "-c", FILLER, repr(settings), when]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert "free some space" in done.stdout
    if when != "corpus":
        assert "run the same command again" in done.stdout
        assert describe_store(out).missing_blocks == (0,)
        with pytest.raises(StoreError, match="unfinished"):
            CacheReader.open(out)
    build_cache(settings)
    assert CacheReader.open(out).rows == 40


@pytest.mark.parametrize("relations", ["hidden", "qkv"])
def test_a_store_is_mended_by_a_command_that_names_other_targets(
    relations: str, small_settings: Settings, tmp_path: Path
) -> None:
    """The attention that it holds is read, and coded, like before, though this command is about hidden states."""
    settings = small_settings(
        tmp_path / "cache.zarr", precision="nmse:1e-2", layers="2", attention_layer=4, relations=relations
    )
    build_cache(settings)
    whole = {file: file.read_bytes() for file in (tmp_path / "cache.zarr").rglob("*") if file.is_file()}
    lost = next(file for file in whole if "hidden/2/codes/" in file.as_posix() and "/c/" in file.as_posix())
    lost.unlink()
    other = replace(settings, targets="hidden", attention_layer=None, relations=None)
    build_cache(other)
    assert {file: file.read_bytes() for file in whole if "/c/" in file.as_posix()} == {
        file: data for file, data in whole.items() if "/c/" in file.as_posix()
    }
    CacheReader.open(settings.out)
