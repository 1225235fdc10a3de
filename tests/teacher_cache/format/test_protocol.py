"""Commits, seals, manifests and lists come back as they were written, and not at all once anything in them differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import HiddenSpec, TargetSpecs
from teacher_cache.errors import StoreError
from teacher_cache.format.arrays import ArraySpec
from teacher_cache.format.protocol import (
    NOT_AN_OBJECT,
    Commit,
    ObjectDigest,
    Seal,
    array_of,
    commit_key,
    damage,
    digest_object,
    has_teacher,
    list_commit_hashes,
    parse_manifest,
    read_checked,
    read_commit_hashes,
    read_manifest,
    read_teacher_files,
    shard_key,
    write_checked,
    write_manifest,
    write_teacher_files,
    wrong_size,
)
from teacher_cache.storage.local import LocalStorage

DIGEST = ObjectDigest(size=3, sha256="ab" * 32)
COMMIT = Commit(block=2, rows=(4, 5), shards={"hidden/2/codes/c/2/0/0": DIGEST})
SEAL = Seal(rows=5, blocks=3, bytes_per_array={"hidden/2/codes": 9}, objects={"zarr.json": DIGEST}, format_version=1)
TARGETS = TargetSpecs(hidden=(HiddenSpec(layer=2, codec="int8"),))


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


def changed_bytes(data: bytes) -> list[bytes]:
    """Every single byte of an object changed, one at a time, and the object cut short or made longer."""
    changes = [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in range(len(data))]
    return [*changes, data[:-1], data + b"\n", b""]


def test_keys_are_those_of_zarr_and_of_the_specification() -> None:
    spec = ArraySpec(path="hidden/2/codes", dtype="int8", block_shape=(32, 8), chunk_shape=(32, 8))
    assert shard_key(spec, 7) == "hidden/2/codes/c/7/0/0"
    assert array_of(shard_key(spec, 7)) == "hidden/2/codes"
    assert commit_key(7) == "commits/00000007.json"


def test_a_commit_and_a_seal_come_back_as_they_were() -> None:
    assert Commit.from_bytes(COMMIT.to_bytes()) == COMMIT
    assert Seal.from_bytes(SEAL.to_bytes()) == SEAL


@pytest.mark.parametrize("written", [COMMIT, SEAL], ids=["commit", "seal"])
def test_no_changed_byte_of_a_commit_or_seal_is_read(written: Commit | Seal) -> None:
    for data in changed_bytes(written.to_bytes()):
        with pytest.raises(NOT_AN_OBJECT):
            type(written).from_bytes(data)


@pytest.mark.parametrize("data", [b"[]", b"null", b'{"sha256": 1}', b"{}", b"\xff", b"3"])
def test_json_that_is_no_object_with_its_own_hash_is_refused(data: bytes) -> None:
    with pytest.raises(NOT_AN_OBJECT):
        read_checked(data)


def test_the_hash_in_an_object_is_that_of_its_other_fields_as_sorted_json() -> None:
    fields = json.loads(write_checked({"b": [1, 2], "a": "ä"}))
    assert fields.pop("sha256") == hashlib.sha256('{"a":"ä","b":[1,2]}'.encode()).hexdigest()
    assert fields == {"b": [1, 2], "a": "ä"}


def test_the_list_of_commits_is_what_sha256sum_checks() -> None:
    hashes = [hashlib.sha256(bytes([block])).hexdigest() for block in range(3)]
    listed = list_commit_hashes(hashes)
    assert listed.decode().splitlines()[1] == f"{hashes[1]}  commits/00000001.json"
    assert read_commit_hashes(listed) == hashes


def test_damage_is_named_by_what_is_seen_first(storage: LocalStorage) -> None:
    storage.write("one", b"abc")
    digest = ObjectDigest.of(b"abc")
    assert digest == ObjectDigest(size=3, sha256=hashlib.sha256(b"abc").hexdigest()) == digest_object(storage, "one")
    assert damage(storage, "one", digest) is None
    storage.write("one", b"abd")
    assert wrong_size(storage, "one", digest) is None, "which is all that a look at its size can say"
    assert damage(storage, "one", digest) == "has other contents than were written"
    storage.write("one", b"abcd")
    assert damage(storage, "one", digest) == wrong_size(storage, "one", digest) == "has 4 bytes instead of 3"
    storage.delete("one")
    assert damage(storage, "one", digest) == "is missing"
    with pytest.raises(FileNotFoundError):
        digest_object(storage, "one")


def test_a_manifest_comes_back_and_no_changed_byte_of_it_does(
    storage: LocalStorage, small_manifest: Callable[..., Manifest]
) -> None:
    manifest = small_manifest(TARGETS)
    write_manifest(storage, "extensions/1/", manifest)
    assert read_manifest(storage, "extensions/1/") == manifest
    data = storage.read("extensions/1/zarr.json")
    assert json.loads(data)["node_type"] == "group", "zarr opens it as a group"
    for changed in changed_bytes(data):
        with pytest.raises((StoreError, *NOT_AN_OBJECT)):
            parse_manifest(changed)


def test_what_there_is_instead_of_a_manifest_is_said(
    storage: LocalStorage, small_manifest: Callable[..., Manifest]
) -> None:
    with pytest.raises(StoreError, match="no store at .*kdcache build --out"):
        read_manifest(storage)
    storage.write("thesis.txt", b"precious")
    with pytest.raises(StoreError, match="is not a store .*must not be read as targets or overwritten"):
        read_manifest(storage)
    storage.write("zarr.json", b'{"attributes": {}}')
    with pytest.raises(StoreError, match="no kdcache manifest"):
        read_manifest(storage)
    write_manifest(storage, "", small_manifest(TARGETS))
    storage.write("zarr.json", storage.read("zarr.json").replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(StoreError, match="is not a store"):
        read_manifest(storage)
    storage.write("commits/00000000.json", COMMIT.to_bytes())
    with pytest.raises(StoreError, match=r"is damaged: 'zarr.json' cannot be read \(ValueError: it does not match"):
        read_manifest(storage)


def test_a_teacher_is_there_once_every_listed_file_has_its_size(storage: LocalStorage) -> None:
    assert not has_teacher(storage)
    files = {f"teacher/{name}": ObjectDigest.of(name.encode()) for name in ("config.json", "model.safetensors")}
    write_teacher_files(storage, files)
    assert read_teacher_files(storage) == files and not has_teacher(storage)
    for key in files:
        storage.write(key, key.removeprefix("teacher/").encode())
    assert has_teacher(storage)
    storage.write("teacher/config.json", b"short")
    assert not has_teacher(storage)
    storage.write("teacher.json", b"{}")
    assert not has_teacher(storage)
