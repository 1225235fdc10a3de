"""Where no block is written, other settings take the place; where one is, they are refused, with the way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.build.build import Silent, build_cache
from teacher_cache.build.plan import plan_build
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import SpaceError, StoreError
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from teacher_cache.verify.verify import verify_store

Settings = Callable[..., BuildSettings]


class StopAfterTheFirstBlock(Silent):
    def committed(self, rows: int, total: int, written_bytes: int) -> None:
        if rows:
            raise InterruptedError


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[BuildSettings], str]:
    """A build on a disk that is too small; returns the message."""

    def refuse(settings: BuildSettings) -> str:
        with monkeypatch.context() as small_disk:
            small_disk.setattr(LocalStorage, "free_bytes", lambda self: 1000)
            with pytest.raises(SpaceError) as refused:
                build_cache(settings)
        return str(refused.value)

    return refuse


def contents(store: Path) -> dict[str, bytes]:
    """Every file but the manifests, which record the time, and the seals, which hold their hashes."""
    files = {file.relative_to(store).as_posix(): file for file in sorted(store.rglob("*")) if file.is_file()}
    provenance = {prefix + name for prefix in ("", "extensions/1/") for name in ("zarr.json", "seal.json")}
    return {key: file.read_bytes() for key, file in files.items() if key not in provenance}


@pytest.mark.parametrize(
    "changes", [{"max_rows": 8}, {"precision": "int8"}, {"targets": "logits"}, {"family": "roberta"}], ids=str
)
def test_a_build_that_was_refused_for_its_size_is_started_over_with_less(
    refuse: Callable[[BuildSettings], str], small_settings: Settings, tmp_path: Path, changes: dict[str, object]
) -> None:
    out, precision = tmp_path / "cache.zarr", {"precision": "nmse:1e-2"}
    message = refuse(small_settings(out, **precision))
    assert "no block has been written" in message and "the same --out takes other settings" in message
    less = small_settings(out, **{**precision, **changes})
    plan = plan_build(less)
    assert build_cache(less).computed_rows == plan.manifest.rows
    build_cache(small_settings(tmp_path / "fresh.zarr", **{**precision, **changes}))
    assert contents(out) == contents(tmp_path / "fresh.zarr")
    report = verify_store(LocalStorage(out))
    assert report.whole and not report.unknown
    assert plan.other_bytes > sum(file.stat().st_size for file in (out / "teacher").iterdir())


def test_added_targets_that_were_refused_for_their_size_are_started_over_with_less(
    refuse: Callable[[BuildSettings], str], small_settings: Settings, small_store: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(small_store, tmp_path / "cache.zarr"))
    finer = small_settings(out, targets="hidden", layers="1", precision="nmse:1e-3")
    refuse(finer)
    coarser = replace(finer, precision="int8")
    assert plan_build(coarser).manifest.targets.hidden[0].codec == "int8"
    assert build_cache(coarser).computed_rows == 40
    report = verify_store(LocalStorage(out))
    assert report.whole and not report.unknown
    assert [spec.codec for spec in CacheReader.open(out).manifest.targets.hidden] == ["int8", "float16", "float16"]


def test_an_unfinished_build_with_blocks_is_refused_other_settings(
    refuse: Callable[[BuildSettings], str], small_settings: Settings, tmp_path: Path
) -> None:
    settings = small_settings(tmp_path / "cache.zarr", block_rows=4)
    with pytest.raises(InterruptedError):
        build_cache(settings, StopAfterTheFirstBlock())
    message = refuse(settings)
    assert "nothing more has been written" in message and "in another --out" in message
    with pytest.raises(StoreError, match="an unfinished store with other settings"):
        build_cache(replace(settings, precision="int8"))


def test_added_targets_with_blocks_are_refused_other_settings_until_they_are_given_up(
    small_settings: Settings, small_store: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(small_store, tmp_path / "cache.zarr"))
    finer = small_settings(out, targets="hidden", layers="1")
    with pytest.raises(InterruptedError):
        build_cache(finer, StopAfterTheFirstBlock())
    coarser = replace(finer, precision="int8")
    with pytest.raises(StoreError, match=r"(?s)hidden 1: .*extension 1 is unfinished: run.*delete 'extensions/1/'"):
        build_cache(coarser)
    shutil.rmtree(out / "extensions/1")
    assert build_cache(coarser).computed_rows == 40
    report = verify_store(LocalStorage(out))
    assert report.whole and not report.unknown


def test_what_others_need_is_not_started_over_in_another_precision(small_settings: Settings, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "cache.zarr", targets="hidden", layers="2", block_rows=40)
    build_cache(settings)
    build_cache(replace(settings, layers="3"))
    build_cache(replace(settings, targets="attention", attention_layer=4))
    (tmp_path / "cache.zarr/hidden/3/codes/c/0/0/0").unlink()
    _, eviction = evict_damage(LocalStorage(settings.out))
    assert (eviction.groups[0].blocks, eviction.left_out) == ((0,), ("extension 2",))
    with pytest.raises(StoreError, match="hidden 3: the store has 'plain view, float16'"):
        build_cache(replace(settings, layers="3", precision="int8"))
    build_cache(replace(settings, layers="3"))
    assert CacheReader.open(settings.out).manifest.targets.attention_layers() == (4,)
