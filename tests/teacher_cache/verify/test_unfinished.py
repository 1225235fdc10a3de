"""Before a seal vouches for them, objects are compared with what the manifest implies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Lock

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.storage.local import LocalStorage
from tests.teacher_cache.verify.damages import UNSEALED, check, files_of, flip

Settings = Callable[..., BuildSettings]


def test_of_an_unfinished_store_blocks_are_checked_and_missing_ones_listed(store: Path) -> None:
    for key in ("seal.json", "extensions/1/seal.json", "commits/00000001.json"):
        (store / key).unlink()
    (store / "input_ids/c/1/0/0").write_bytes(b"in flight")
    report = check(store)
    assert not report.findings
    assert not report.unknown
    assert not report.whole
    assert [(group.sealed, group.missing_blocks) for group in report.groups] == [(False, (1,)), (False, ())]
    for key in ("input_ids/c/2/0/0", "hidden/3/escapes/count/c/0/0"):
        flip(store / key)
    assert {finding.key: finding.block for finding in check(store).findings} == {
        "input_ids/c/2/0/0": 2,
        "hidden/3/escapes/count/c/0/0": 0,
    }


def test_after_every_single_write_of_a_build_nothing_is_damaged_or_unknown(
    small_settings: Settings,
    grown_settings: Callable[[Path], BuildSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A build and one that adds a layer, either killed at any moment, leave only what a check knows."""
    store, lock, looks = tmp_path / "cache.zarr", Lock(), 0

    def looked_at(write: Callable[..., None]) -> Callable[..., None]:
        def write_and_look(storage: LocalStorage, key: str, *what: object) -> None:
            nonlocal looks
            with lock:
                write(storage, key, *what)
                if storage.location == str(store) and (store / "zarr.json").exists():
                    report = check(store)
                    assert not report.findings, f"after {key}"
                    assert not report.unknown, f"after {key}"
                    looks += 1

        return write_and_look

    for name in ("write", "write_file", "delete"):
        monkeypatch.setattr(LocalStorage, name, looked_at(getattr(LocalStorage, name)))
    build_cache(small_settings(store, precision="nmse:1e-2", views=2))
    build_cache(grown_settings(store))
    assert check(store).whole
    assert looks > len(files_of(store)) - 5


@pytest.mark.parametrize("name", UNSEALED)
def test_damage_is_found_before_there_is_a_seal(nmse_store: Path, tmp_path: Path, name: str) -> None:
    store = Path(shutil.copytree(nmse_store, tmp_path / "cache.zarr"))
    (store / "seal.json").unlink()
    do, key = UNSEALED[name]
    do(store)
    assert key in [finding.key for finding in check(store).findings]
