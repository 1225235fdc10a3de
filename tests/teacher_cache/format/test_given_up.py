"""What a group has given up: an object that counts where the seal lists it, or where there is no seal."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from teacher_cache.contract.targets import describe_targets
from teacher_cache.errors import StoreError
from teacher_cache.format.given_up import (
    NOTHING,
    folders_of,
    given_up_key,
    is_below,
    number_of,
    read_given_up,
    without,
    write_given_up,
)
from teacher_cache.format.groups import read_groups, read_seal
from teacher_cache.format.protocol import ObjectDigest, read_manifest, write_checked
from teacher_cache.storage.local import LocalStorage


@pytest.fixture
def storage(small_store: Path, tmp_path: Path) -> LocalStorage:
    return LocalStorage(shutil.copytree(small_store, tmp_path / "cache.zarr"))


def test_the_manifest_without_some_targets(storage: LocalStorage) -> None:
    manifest = read_manifest(storage)
    assert folders_of(manifest.targets) == {"logits", "hidden/2", "hidden/4", "attention/3"}
    assert without(manifest, ()) is manifest
    left = without(manifest, {"logits", "hidden/2", "masked"})
    assert list(describe_targets(left.targets)) == ["hidden 4", "attention 3"]
    assert replace(left, targets=manifest.targets) == manifest


def test_names(storage: LocalStorage) -> None:
    assert number_of(given_up_key("extensions/1/", 12), "extensions/1/") == 12
    for key in ("given-up/1.json", "given-up/01.json", "given-up/0.json", "given-up/x.json", "given-up/²", "seal.json"):
        assert number_of(key, "") == (1 if key == "given-up/1.json" else 0)
    assert is_below("hidden/2/codes/c/0", {"hidden/2"}) and not is_below("hidden/21/codes", {"hidden/2"})


def test_it_counts_once_the_seal_lists_it_and_without_a_seal(storage: LocalStorage) -> None:
    seal = read_seal(storage, "")
    assert seal is not None and read_given_up(storage, "", seal) == NOTHING
    storage.write("given-up/1.json", write_given_up({"logits"}))
    storage.write("given-up/2.json", write_given_up({"logits", "masked"}))
    assert read_given_up(storage, "", seal) == NOTHING and read_groups(storage)[0].manifest.targets.logits is not None
    listed = ObjectDigest.of(storage.read("given-up/1.json"))
    sealed = replace(seal, objects={**seal.objects, "given-up/1.json": listed})
    assert read_given_up(storage, "", sealed).folders == {"logits"}
    assert read_given_up(storage, "", None).folders == {"logits", "masked"}
    # what was sealed, and nothing else
    storage.write("given-up/1.json", write_given_up({"hidden/2"}))
    with pytest.raises(StoreError, match="other contents than were sealed"):
        read_given_up(storage, "", sealed)


@pytest.mark.parametrize(
    "folders", [[], ["input_ids"], ["hidden"], ["hidden/02"], ["hidden/2/codes"], ["../x"], "logits", [2], None]
)
def test_what_no_group_can_give_up_is_refused(storage: LocalStorage, folders: object) -> None:
    storage.write("given-up/1.json", write_checked({"folders": folders}))
    with pytest.raises(StoreError, match=r"'given-up/1.json' cannot be read"):
        read_given_up(storage, "", None)
