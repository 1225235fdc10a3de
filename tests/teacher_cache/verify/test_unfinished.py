"""Before a seal vouches for them, objects are compared with what the manifest implies."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from threading import Lock

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.streams import VECTORS
from teacher_cache.format.groups import read_groups
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.overlay import Overlay
from teacher_cache.verify.unfinished import check_unsealed, is_calibrated
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


def look(storage: Overlay, vouched: Collection[str] = ()) -> tuple[dict[str, str], set[str]]:
    (group,) = read_groups(storage)
    return check_unsealed(storage, group, storage.list(), vouched)


@pytest.fixture
def draft(nmse_store: Path) -> Overlay:
    """A store before its seal, to be changed in memory."""
    found = Overlay(LocalStorage(nmse_store))
    found.delete("seal.json")
    return found


def test_all_that_lies_beside_blocks_and_teacher_is_known(draft: Overlay) -> None:
    found, known = look(draft)
    assert not found
    beside = {key for key in draft.list() if key.endswith("/zarr.json") or key.split("/c")[0] in CONSTANTS}
    assert known == beside


CONSTANTS = {
    *(f"hidden/{layer}/{name}" for layer in (2, 4) for name in ("basis", "mean", "step", "variance")),
    *(f"attention/3/projection/{name}/{part}" for name in VECTORS for part in ("weight", "bias")),
}


@pytest.mark.parametrize(
    "path", ["hidden/2/basis", "hidden/4/mean", "hidden/2/step", "hidden/4/variance", "attention/3/projection/key/bias"]
)
def test_constants_that_calibration_fixed_must_be_there_and_others_may_be_about_to_be_written(
    draft: Overlay, path: str
) -> None:
    calibrated = path.endswith(("basis", "mean", "step"))
    assert is_calibrated(read_groups(draft)[0].manifest, path) == calibrated
    (chunk,) = (key for key in draft.list(f"{path}/") if not key.endswith("zarr.json"))
    draft.delete(chunk)
    want = {f"{path}/zarr.json": "is missing, or without its numbers"} if calibrated else {}
    assert look(draft)[0] == want
    draft.delete(f"{path}/zarr.json")
    assert look(draft)[0] == want


@pytest.mark.parametrize("path", ["hidden/2/step", "attention/3/projection/key/weight"])
def test_every_byte_of_a_constant_counts(draft: Overlay, path: str) -> None:
    keys = list(draft.list(f"{path}/"))
    for key in keys:
        whole = draft.read(key)
        for place in {0, len(whole) // 2, len(whole) - 1}:
            draft.write(key, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert set(look(draft)[0]) & set(keys), (key, place)
        draft.write(key, whole)
    assert not look(draft)[0]


def test_what_another_seal_vouches_for_is_left_to_that(draft: Overlay) -> None:
    key = "hidden/2/escapes/count/zarr.json"
    draft.write(key, draft.read(key) + b" ")
    assert set(look(draft)[0]) == {key}
    assert not look(draft, vouched={key})[0]
