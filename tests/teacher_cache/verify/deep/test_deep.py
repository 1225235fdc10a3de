"""What a build stores passes; targets of other rows, layers or teachers do not, however well they are sealed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.derive.derive import derive_store
from teacher_cache.derive.settings import DeriveSettings
from teacher_cache.errors import StoreError, TeacherError
from teacher_cache.format.groups import read_groups
from teacher_cache.format.small_arrays import read_constant, write_constant
from teacher_cache.format.writer import GroupWriter
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.deep.deep import deep_check
from teacher_cache.verify.deep.tolerance import TargetCheck
from teacher_cache.verify.verify import verify_store

Settings = Callable[..., BuildSettings]

FORMS: dict[str, dict[str, Any]] = {
    "float16": {},
    "int8, vectors": {"precision": "int8", "relations": "qkv"},
    "int4, own input": {"precision": "int4", "targets": "attention"},
    "nmse, draws": {"precision": "nmse:1e-2", "logits": "sample", "temperature": 1.5},
    "nmse, projected": {"precision": "nmse:1e-2", "targets": "attention"},
    "nmse, vectors": {"precision": "nmse:1e-1", "relations": "qkv", "targets": "attention"},
    "relation matrices": {"relations": "matrix", "targets": "attention"},
    "masked views": {"precision": "nmse:1e-3", "hs_view": "masked", "views": 3},
    "documents": {"precision": "nmse:1e-2", "rows": "document"},
    "modernbert": {"family": "modernbert"},
    "distilbert": {"family": "distilbert", "precision": "int8"},
}


def by_target(checks: tuple[TargetCheck, ...]) -> dict[str, TargetCheck]:
    return {check.target: check for check in checks}


@pytest.mark.parametrize("name", FORMS)
def test_what_a_build_stores_is_what_the_teacher_gives(small_settings: Settings, tmp_path: Path, name: str) -> None:
    settings = small_settings(tmp_path / "cache.zarr", **FORMS[name])
    build_cache(settings)
    report = deep_check(LocalStorage(settings.out), 16)
    assert not [check for check in report.checks if check.problem]
    assert report.ok
    assert len(report.rows) == len(set(report.rows)) == 16
    assert report.rows[0] < 3
    assert report.rows[-1] > 36
    checks = by_target(report.checks)
    for check in report.checks:
        if check.measure == "NMSE":
            assert 0 < check.stored < 2 * check.declared + 1e-9
            assert check.noise < 1e-9
    asked = FORMS[name].get("targets", "logits,hidden,attention")
    assert ("hidden/2" in checks) == ("hidden" in asked)
    assert any(target.startswith("attention/3") for target in checks)
    assert ("masked inputs" in checks) == any(target.startswith("logits") for target in checks)


def test_every_row_of_a_small_store_and_the_teacher_given_by_name(
    small_settings: Settings, nmse_store: Path, tmp_path: Path
) -> None:
    report = deep_check(LocalStorage(nmse_store), 1000, teacher=small_settings(tmp_path).teacher, device="cpu")
    assert report.rows == tuple(range(40))
    assert report.ok
    one = deep_check(LocalStorage(nmse_store), 1)
    assert one.rows == (20,)
    assert one.ok


def test_a_headless_teacher(small_settings: Settings, tiny_teacher: Callable[..., Path], tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", teacher=str(tiny_teacher("bert", head=False)), max_rows=8)
    build_cache(settings)
    assert deep_check(LocalStorage(settings.out), 4).ok


def test_on_the_real_teacher(shared_teacher: Path, shared_corpus: Path, tmp_path: Path) -> None:
    import gzip

    corpus = tmp_path / "some.txt"
    with gzip.open(shared_corpus, "rt", encoding="utf-8") as text:
        corpus.write_text("".join(line for line, _ in zip(text, range(30), strict=False)), encoding="utf-8")
    settings = BuildSettings(
        teacher=str(shared_teacher), corpus=(str(corpus),), out=str(tmp_path / "cache.zarr"), seq_len=64, max_rows=24,
        layers="2,6", attention_layer=5,
    )  # fmt: skip
    build_cache(settings)
    report = deep_check(LocalStorage(settings.out), 8)
    assert not [check for check in report.checks if check.problem]


@pytest.mark.parametrize(
    "precision, changes",
    [
        ("nmse:1e-3", {"precision": "nmse:1e-2", "k": 4}),
        ("nmse:5e-3", {"precision": "nmse:6e-3", "targets": "attention"}),
        ("float16", {"precision": "int8", "k": 4}),
        ("float16", {"precision": "nmse:1e-2", "targets": "attention"}),
    ],
)
def test_derived_stores_declare_what_they_have_lost(
    small_settings: Settings, tmp_path: Path, precision: str, changes: dict[str, Any]
) -> None:
    source = small_settings(tmp_path / "source.zarr", precision=precision, max_rows=80)
    build_cache(source)
    derived = DeriveSettings(src=source.out, dst=str(tmp_path / "derived.zarr"), **changes)
    derive_store(derived, Silent())
    assert not [check for check in deep_check(LocalStorage(derived.dst), 16).checks if check.problem]


def test_another_teacher_is_refused(nmse_store: Path, tiny_teacher: Callable[..., Path]) -> None:
    with pytest.raises(TeacherError, match="has weights .* was built with .*leave it out"):
        deep_check(LocalStorage(nmse_store), 4, teacher=str(tiny_teacher("bert", seed=1)))


def test_of_an_unfinished_store_finished_blocks_are_compared(nmse_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(nmse_store, tmp_path / "cache.zarr"))
    for key in ("seal.json", "commits/00000000.json"):
        (store / key).unlink()
    report = deep_check(LocalStorage(store), 6)
    assert report.ok
    assert all(row >= 16 for row in report.rows)
    for number in (1, 2):
        (store / f"commits/{number:08d}.json").unlink()
    with pytest.raises(StoreError, match="no finished block yet"):
        deep_check(LocalStorage(store), 6)


# ---- sealed, whole and wrong ----------------------------------------------------------------------------------------


def write_again(store: Path, change: Callable[[dict[str, NDArray[Any]]], object]) -> None:
    """Change the numbers of every block, and commit and seal them as a build would."""
    reader, storage = CacheReader.open(store), LocalStorage(store)
    (group,) = read_groups(storage)
    blocks = [{path: reader.load_array(path, block) for path in group.arrays} for block in range(group.manifest.blocks)]
    writer = GroupWriter(storage, group).unseal()
    for block, arrays in enumerate(blocks):
        values = {path: values.copy() for path, values in arrays.items()}
        change(values)
        writer.write_block(block, values)
    writer.seal()
    assert verify_store(storage).whole


def roll(path: str, by: int, axis: int = -1) -> Callable[[dict[str, NDArray[Any]]], object]:
    return lambda arrays: arrays.update({path: np.roll(arrays[path], by, axis=axis)})


def one_token(arrays: dict[str, NDArray[Any]]) -> None:
    """One token in the midst of each row gets the vector of its neighbour."""
    codes = arrays["hidden/2/codes"].reshape(32, 16, 24)
    codes[:, :, 3] = codes[:, :, 4]


def first_id(arrays: dict[str, NDArray[Any]]) -> None:
    arrays["logits/ids/low"][0] = arrays["logits/ids/low"][1]


WRONG: dict[str, tuple[Callable[[dict[str, NDArray[Any]]], object], str]] = {
    "hidden states of the next row": (roll("hidden/2/codes", 24), "hidden/2"),
    "hidden states of the next token": (roll("hidden/4/codes", 1), "hidden/4"),
    "one wrong token": (one_token, "hidden/2"),
    "other ids": (lambda a: a.update({"logits/ids/low": a["logits/ids/low"] ^ 1}), "logits ids"),
    "an id twice": (first_id, "logits ids"),
    "other probabilities": (
        lambda a: a.update({"logits/log_probs": a["logits/log_probs"] * 2}), "logits probabilities"
    ),
    "another tail": (lambda a: a.update({"logits/log_tail": a["logits/log_tail"] - 1}), "logits tail"),
}  # fmt: skip

IMPOSSIBLE: dict[str, tuple[Callable[[dict[str, NDArray[Any]]], object], str]] = {
    "ids of no word": (lambda a: a.update({"logits/ids/low": a["logits/ids/low"] | 200}), "logits/ids"),
    "other originals": (roll("masked/original_ids", 1, axis=0), "masked/original_ids"),
    "other positions": (lambda a: a.update({"masked/positions": a["masked/positions"] + 1}), "masked/original_ids"),
    "positions behind the row": (
        lambda a: a.update({"masked/positions": a["masked/positions"] + 30}), "masked/positions"
    ),
}  # fmt: skip
"""What no teacher could have given, so that reading refuses it before anything is compared."""


@pytest.mark.parametrize("name", WRONG)
def test_wrong_targets_are_found_though_every_checksum_is_right(small_store: Path, tmp_path: Path, name: str) -> None:
    change, target = WRONG[name]
    store = Path(shutil.copytree(small_store, tmp_path / "cache.zarr"))
    write_again(store, change)
    report = deep_check(LocalStorage(store), 4)
    assert not report.ok
    assert by_target(report.checks)[target].problem


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_teacher_could_have_given_is_refused_by_array(small_store: Path, tmp_path: Path, name: str) -> None:
    change, array = IMPOSSIBLE[name]
    store = Path(shutil.copytree(small_store, tmp_path / "cache.zarr"))
    write_again(store, change)
    with pytest.raises(StoreError, match=f"'{array}' of block .* which must be"):
        deep_check(LocalStorage(store), 4)


def test_wrong_draws_are_found(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", logits="sample", targets="logits")
    build_cache(settings)

    def move_one(arrays: dict[str, NDArray[Any]]) -> None:
        arrays["logits/draws/ids/low"][0, 0] ^= 1

    write_again(Path(settings.out), move_one)
    report = deep_check(LocalStorage(settings.out), 40)
    assert [check.target for check in report.checks if check.problem] == ["logits draws"]


@pytest.mark.parametrize("store_name, path", [("nmse_store", "hidden/2/mean"), ("small_store", "")])
def test_wrong_constants_are_found(request: pytest.FixtureRequest, tmp_path: Path, store_name: str, path: str) -> None:
    """A rotation's mean, and the projections of another layer."""
    store = Path(shutil.copytree(request.getfixturevalue(store_name), tmp_path / "cache.zarr"))
    storage = LocalStorage(store)
    (group,) = read_groups(storage)
    path = path or "attention/3/projection/key/weight"
    write_constant(storage, path, -read_constant(storage, path))
    GroupWriter(storage, group).unseal().seal()
    assert verify_store(storage).whole
    report = deep_check(storage, 16)
    problems = [check.target for check in report.checks if check.problem]
    assert problems == (["hidden/2", "attention/3"] if path.startswith("hidden") else ["attention/3"])
