"""Of a store of three blocks, written by hand: no byte is handed out that neither a seal nor a commit vouches for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import HiddenSpec, TargetSpecs
from teacher_cache.errors import DamagedStoreError, StoreError
from teacher_cache.format.groups import Group, read_groups
from teacher_cache.format.protocol import ObjectDigest, commit_key, shard_key, write_manifest, write_teacher_files
from teacher_cache.format.shards import decode_shard
from teacher_cache.format.small_arrays import write_constant
from teacher_cache.format.verified import VerifiedObjects
from teacher_cache.format.writer import GroupWriter
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.local_cache import LocalCache

CODES, SCALE = "hidden/2/codes", "hidden/2/scale"
SECOND = "hidden/2/codes/c/1/0/0"


def write_group(storage: LocalStorage, prefix: str, manifest: Manifest) -> GroupWriter:
    """All blocks of a group, every number of a block being its number; not sealed."""
    write_manifest(storage, prefix, manifest)
    writer = GroupWriter(storage, Group(prefix=prefix, manifest=manifest, seal=None))
    writer.write_metadata()
    for path in writer.group.layout.constants:
        write_constant(storage, path, np.array(1.0))
    for block in range(manifest.blocks):
        arrays = writer.group.arrays.values()
        writer.write_block(block, {spec.path: np.full(spec.block_shape, block, dtype=spec.dtype) for spec in arrays})
    return writer


@pytest.fixture
def store(small_manifest: Callable[..., Manifest], tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "store")
    writer = write_group(
        storage, "", small_manifest(TargetSpecs(hidden=(HiddenSpec(layer=2, codec="int8", view="masked"),)))
    )
    names = ("teacher/config.json", "teacher/tokenizer.json")
    for name in names:
        storage.write(name, b"{}")
    write_teacher_files(storage, dict.fromkeys(names, ObjectDigest.of(b"{}")))
    writer.seal()
    return storage


def objects(storage: LocalStorage, copies: LocalCache | None = None) -> VerifiedObjects:
    return VerifiedObjects(storage, read_groups(storage), copies)


def flip(storage: LocalStorage, key: str, place: int = -1) -> None:
    data = bytearray(storage.read(key))
    data[place] ^= 1
    storage.write(key, bytes(data))


def test_every_shard_is_what_was_written(store: LocalStorage) -> None:
    verified = objects(store)
    verified.check_metadata()
    for path, (group, spec) in verified.arrays.items():
        assert group.prefix == ""
        for block in range(3):
            assert bool((decode_shard(spec, verified.shard(path, block)) == block).all())
    assert verified.teacher_folder().joinpath("config.json").read_bytes() == b"{}"


def test_no_changed_byte_of_a_shard_is_handed_out(store: LocalStorage) -> None:
    data = store.read(SECOND)
    for place in range(0, len(data), 7):
        flip(store, SECOND, place)
        with pytest.raises(DamagedStoreError, match=rf"{SECOND}' \(block 1 of {CODES}\) has other contents"):
            objects(store).shard(CODES, 1)
        store.write(SECOND, data)
    objects(store).shard(CODES, 1)


@pytest.mark.parametrize(
    "damage, what",
    [
        (lambda s: s.delete(SECOND), "is missing"),
        (lambda s: s.write(SECOND, s.read(SECOND)[:-1]), "bytes instead of"),
        (lambda s: s.write(SECOND, s.read(SECOND.replace("/1/", "/2/"))), "has other contents|bytes instead of"),
        (lambda s: s.delete(commit_key(1)), r"commits/00000001.json' cannot be read \(FileNotFoundError"),
        (lambda s: flip(s, commit_key(1), 40), "commits/00000001.json' cannot be read"),
        (lambda s: s.write(commit_key(1), s.read(commit_key(2))), "was changed after the store was sealed"),
    ],
    ids=["missing", "cut short", "of another block", "no commit", "a damaged commit", "another block's commit"],
)
def test_damage_in_a_block_is_named_and_the_other_blocks_are_read(
    store: LocalStorage, damage: Callable[[LocalStorage], None], what: str
) -> None:
    damage(store)
    verified = objects(store)
    with pytest.raises(DamagedStoreError, match=what):
        verified.shard(CODES, 1)
    for block in (0, 2):
        assert verified.shard(CODES, block) == store.read(shard_key(verified.arrays[CODES][1], block))


def test_a_commit_that_does_not_name_the_shard_is_not_enough(store: LocalStorage) -> None:
    """Of an unfinished group no seal vouches for the commits, but each must say what the manifest implies."""
    store.delete("seal.json")
    assert objects(store).shard(CODES, 1) == store.read(SECOND)
    (group,) = read_groups(store)
    lacking = replace(group.manifest, targets=TargetSpecs())
    write_manifest(store, "", lacking)
    with pytest.raises(DamagedStoreError, match=r"lacks \[\] and has \['hidden/2/codes/c/1/0/0'"):
        objects(store).shard("input_ids", 1)


def test_damage_in_the_list_of_commits_is_the_whole_stores(store: LocalStorage) -> None:
    flip(store, "commits.sha256", 0)
    objects(store).check_metadata()  # which looks at its size alone: it grows with the store
    with pytest.raises(StoreError, match="commits.sha256' has other contents") as refused:
        objects(store).shard(CODES, 1)
    assert not isinstance(refused.value, DamagedStoreError), "there is no block to skip"
    store.write("commits.sha256", b"short")
    with pytest.raises(DamagedStoreError, match="commits.sha256' has 5 bytes instead of"):
        objects(store).check_metadata()


@pytest.mark.parametrize("key", ["input_ids/zarr.json", "hidden/2/variance/c", "teacher.json", "hidden/zarr.json"])
def test_what_every_reader_needs_is_compared_on_opening(store: LocalStorage, key: str) -> None:
    flip(store, key)
    with pytest.raises(DamagedStoreError, match=f"{key}' has other contents"):
        objects(store).check_metadata()


def test_the_teacher_is_compared_when_it_is_asked_for(store: LocalStorage) -> None:
    flip(store, "teacher/config.json")
    verified = objects(store)
    verified.check_metadata()
    with pytest.raises(DamagedStoreError, match=r"teacher/config.json' has other contents.*kdcache verify --evict"):
        verified.teacher_folder()
    store.delete("teacher.json")
    with pytest.raises(DamagedStoreError, match="teacher.json' cannot be read"):
        verified.teacher_folder()


def test_copies_stand_in_for_the_store_and_a_damaged_copy_does_not(store: LocalStorage, tmp_path: Path) -> None:
    copies = LocalCache(tmp_path / "copies", 2**20)
    want = objects(store, copies).shard(CODES, 1)
    kept = [path for path in (tmp_path / "copies").rglob("*") if path.is_file() and path.name != "lock"]
    assert len(kept) == 3, "the shard, its commit and the list of commits"
    hidden = {key: store.read(key) for key in (SECOND, commit_key(1), "commits.sha256")}
    for key in hidden:
        store.delete(key)
    assert objects(store, copies).shard(CODES, 1) == want
    for path in kept:
        path.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="is missing"):
        objects(store, copies).shard(CODES, 1)
    for key, data in hidden.items():
        store.write(key, data)
    assert objects(store, copies).shard(CODES, 1) == want


def test_of_two_groups_that_hold_the_masks_the_first_finished_one_counts(
    store: LocalStorage, small_manifest: Callable[..., Manifest]
) -> None:
    for number, layer in ((1, 3), (2, 4)):
        targets = TargetSpecs(hidden=(HiddenSpec(layer=layer, codec="int8", view="masked"),))
        writer = write_group(store, f"extensions/{number}/", small_manifest(targets, inputs_held=("plain",)))
    first, _, second = read_groups(store)
    # as if the first build had read plain views alone
    plain = replace(
        first, manifest=replace(first.manifest, targets=TargetSpecs(hidden=(HiddenSpec(layer=1, codec="int8"),)))
    )
    groups = [plain, *read_groups(store)[1:]]
    assert VerifiedObjects(store, groups).arrays["masked/count"][0].prefix == "extensions/1/"
    writer.seal()
    groups = [plain, *read_groups(store)[1:]]
    assert VerifiedObjects(store, groups).arrays["masked/count"][0].prefix == second.prefix
