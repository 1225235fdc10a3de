"""What is damaged is taken out and made again by a build; what no build makes again is left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from teacher_cache.errors import StoreError
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from tests.teacher_cache.verify.damages import DAMAGES, UNSEALED, check, files_of, read_everything

Settings = Callable[..., BuildSettings]


BLOCKS = [name for name, damage in DAMAGES.items() if damage.mendable and damage.block is not None]


OTHERS = [name for name, damage in DAMAGES.items() if damage.mendable and damage.block is None and "a seal" not in name]


@pytest.mark.parametrize(
    "names", [BLOCKS[:6], BLOCKS[6:], OTHERS[:4], OTHERS[4:]], ids=["shards", "commits", "metadata", "teacher"]
)
def test_what_was_evicted_is_made_again_byte_for_byte(
    store: Path, grown_store: Path, grown_settings: Callable[[Path], BuildSettings], names: list[str]
) -> None:
    for name in names:
        DAMAGES[name].do(store)
    _, eviction = evict_damage(LocalStorage(store))
    dropped = sum(len(group.blocks) for group in eviction.groups)
    report = build_cache(grown_settings(store))
    assert (report.computed_rows == 0) == (dropped == 0)
    assert files_of(store) == files_of(grown_store)
    assert check(store).whole
    read_everything(store)


def test_a_group_that_cannot_be_mended_is_left_alone_and_the_other_is_mended(store: Path, grown_store: Path) -> None:
    for name in ("a rotation", "a missing shard", "an added layer's shard"):
        DAMAGES[name].do(store)
    _, eviction = evict_damage(LocalStorage(store))
    assert [finding.key for finding in eviction.beyond_repair] == ["hidden/2/basis/c/0/0"]
    assert [(group.name, group.blocks) for group in eviction.groups] == [("extension 1", (2,))]
    assert (store / "seal.json").exists()
    assert (store / "commits/00000000.json").exists()
    # with the rotation from a copy it goes on
    shutil.copy(grown_store / "hidden/2/basis/c/0/0", store / "hidden/2/basis/c/0/0")
    _, eviction = evict_damage(LocalStorage(store))
    assert [(group.name, group.blocks) for group in eviction.groups] == [("the first build", (0,))]


def test_a_build_does_not_seal_damage_beside_the_blocks_that_it_makes_again(
    store: Path, grown_settings: Callable[[Path], BuildSettings]
) -> None:
    for name in ("a missing shard", "the teacher's weights"):
        DAMAGES[name].do(store)
    with pytest.raises(StoreError, match="'teacher/model.safetensors' has other contents.*kdcache verify --evict"):
        build_cache(grown_settings(store))
    assert (store / "seal.json").exists()


def test_nothing_is_evicted_while_somebody_writes(store: Path) -> None:
    DAMAGES["a missing shard"].do(store)
    with LocalStorage(store).lock(), pytest.raises(StoreError, match="being written by another process"):
        evict_damage(LocalStorage(store))


def test_an_unfinished_store_is_mended_as_well(nmse_store: Path, small_settings: Settings, tmp_path: Path) -> None:
    store = Path(shutil.copytree(nmse_store, tmp_path / "cache.zarr"))
    (store / "seal.json").unlink()
    for name in ("metadata", "a teacher", "rows of a commit"):
        UNSEALED[name][0](store)
    _, eviction = evict_damage(LocalStorage(store))
    assert eviction.groups[0].blocks == (0,)
    build_cache(small_settings(store, precision="nmse:1e-2", views=2))
    assert files_of(store) == files_of(nmse_store)
