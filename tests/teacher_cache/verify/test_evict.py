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
from teacher_cache.storage.overlay import Overlay
from teacher_cache.verify.evict import Eviction, evict_damage
from teacher_cache.verify.verify import verify_store
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


@pytest.fixture
def draft(grown_store: Path) -> Overlay:
    """The store, to be damaged and mended in memory."""
    return Overlay(LocalStorage(grown_store))


def test_of_a_whole_store_nothing_is_taken(draft: Overlay) -> None:
    report, eviction = evict_damage(draft)
    assert report.whole
    assert eviction == Eviction(groups=(), beyond_repair=(), given_up=(), left_out=(), cleared={})
    assert draft.written == {} and draft.added_bytes() == 0


def test_a_block_goes_whole_and_nothing_else_but_the_seal(draft: Overlay) -> None:
    before = set(draft.list())
    draft.write("input_ids/c/1/0/0", b"other")
    _, eviction = evict_damage(draft)
    (group,) = eviction.groups
    assert (group.blocks, group.objects) == ((1,), ())
    gone = before - set(draft.list())
    assert {"seal.json", "commits/00000001.json", "input_ids/c/1/0/0"} <= gone
    blocks = {key.split("/c/")[1].split("/")[0] for key in gone if "/c/" in key}
    assert blocks == {"1"} and not any(key.startswith(("extensions", "hidden/3", "teacher")) for key in gone)
    assert eviction.left_out == (), "the extension needs nothing of the first build to be read"


def test_shards_come_after_their_commit_and_the_seal_last(draft: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that being killed in between leaves a block without a commit, or damage that is found again."""
    deleted: list[str] = []
    delete = draft.delete
    monkeypatch.setattr(draft, "delete", lambda key: (deleted.append(key), delete(key)))
    draft.write("input_ids/c/1/0/0", b"other")
    evict_damage(draft)
    assert deleted[0] == "commits/00000001.json" and deleted[-2:] == ["commits.sha256", "seal.json"]
    assert all("/c/1" in key for key in deleted[1:-2])


def test_an_unfinished_extension_that_nothing_names_is_given_up(draft: Overlay) -> None:
    draft.delete("extensions/1/seal.json")
    draft.write("extensions/1/zarr.json", b"{}")
    _, eviction = evict_damage(draft)
    assert eviction.given_up == ("extension 1",) and not eviction.groups and not eviction.beyond_repair
    assert not draft.list("extensions/")
    assert verify_store(draft).whole


@pytest.mark.parametrize("name", ["basis", "mean", "step"])
@pytest.mark.parametrize("object_", ["zarr.json", "chunk"])
def test_what_calibration_fixed_is_beyond_repair(draft: Overlay, name: str, object_: str) -> None:
    keys = draft.list(f"hidden/2/{name}/")
    (key,) = (key for key in keys if key.endswith("zarr.json") == (object_ == "zarr.json"))
    draft.delete(key)
    before = draft.list()
    _, eviction = evict_damage(draft)
    assert [finding.key for finding in eviction.beyond_repair] == [key]
    assert not eviction.groups and draft.list() == before


def test_a_constant_that_a_build_writes_again_goes_with_its_metadata(draft: Overlay) -> None:
    """A build looks for the chunk alone, and what lies around it must be of the same build."""
    keys = list(draft.list("hidden/2/variance/"))
    draft.write("hidden/2/variance/c", b"otherwise....")
    _, eviction = evict_damage(draft)
    assert set(eviction.groups[0].objects) == set(keys)
    assert not draft.list("hidden/2/variance/") and draft.list("hidden/2/mean/")
