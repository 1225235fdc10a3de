"""Objects that were sealed with contents that cannot be: the bytes are those that the seal names, and still wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.format.groups import Group, read_seal
from teacher_cache.format.protocol import digest_object, read_manifest
from teacher_cache.format.small_arrays import write_constant
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.contents import impossible_contents
from teacher_cache.verify.verify import verify_store
from tests.forged import edit_checked, edit_manifest, reseal


def found_in(store: Path) -> dict[str, str]:
    storage = LocalStorage(store)
    seal = read_seal(storage, "")
    assert seal is not None
    return dict(impossible_contents(storage, Group(prefix="", manifest=read_manifest(storage), seal=seal), seal))


def wrong_type(store: Path) -> None:
    path = store / "input_ids" / "zarr.json"
    path.write_text(path.read_text().replace('"int32"', '"uint32"'))


def no_json(store: Path) -> None:
    (store / "input_ids" / "zarr.json").write_text("[" * 100_000)


def other_width(store: Path) -> None:
    edit_manifest(store, lambda fields: fields.update(mlm_probability=0.5))


@pytest.mark.parametrize(
    "spoil, key, what",
    [
        (wrong_type, "input_ids/zarr.json", "another shape or type"),
        (no_json, "input_ids/zarr.json", "another shape or type"),
        (other_width, "masked/positions/zarr.json", "another shape or type"),
        (
            lambda store: write_constant(LocalStorage(store), "hidden/2/mean", np.zeros(7, np.float32)),
            "hidden/2/mean/zarr.json",
            "no build writes",
        ),
        (
            lambda store: edit_checked(store / "teacher.json", lambda fields: fields.update(files=3)),
            "teacher.json",
            "cannot be read",
        ),
    ],
)
def test_what_cannot_be_is_named_though_its_hash_is_right(
    store: Path, spoil: Callable[[Path], None], key: str, what: str
) -> None:
    assert found_in(store) == {}
    spoil(store)
    try:
        reseal(store)
    except (AttributeError, TypeError):  # a list of files that is none
        edit_checked(store / "seal.json", lambda fields: fields["objects"].update({"teacher.json": _digest(store)}))
    found = found_in(store)
    assert what in found[key]
    assert key in [finding.key for finding in verify_store(LocalStorage(store)).findings]


def _digest(store: Path) -> dict[str, object]:
    digest = digest_object(LocalStorage(store), "teacher.json")
    return {"size": digest.size, "sha256": digest.sha256}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_the_list_of_the_teacher_and_the_seal_name_the_same_files(store: Path, name: str) -> None:
    edit_checked(store / "seal.json", lambda fields: fields["objects"].pop(f"teacher/{name}"))
    assert "other files of the teacher" in found_in(store)["teacher.json"]


def test_bytes_that_were_changed_are_left_to_their_hash(store: Path) -> None:
    wrong_type(store)
    assert found_in(store) == {}
