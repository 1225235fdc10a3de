"""One group as it lies there: what is expected of its objects, and that no content of any object ends a survey."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache.format.protocol import Commit, Seal, digest_object
from teacher_cache.storage.local import LocalStorage
from teacher_cache.storage.overlay import Overlay
from teacher_cache.verify.survey import Survey

PROTOCOL = ("seal.json", "zarr.json", "commits/00000001.json", "commits.sha256", "teacher.json")


def survey(storage: Overlay | LocalStorage, prefix: str = "") -> Survey:
    found = Survey(storage, storage.list(), prefix)
    found.run()
    return found


def test_a_seal_and_its_commits_vouch_for_every_object_beside_themselves(nmse_store: Path) -> None:
    storage = LocalStorage(nmse_store)
    found = survey(storage)
    assert not found.findings and not found.missing
    expected = {one.key: one.digest for one in found.expected}
    assert len(expected) == len(found.expected)
    read = {key for key in storage.list() if key.startswith("commits/") or key == "seal.json"}
    assert set(expected) == set(storage.list()) - read
    assert all(digest_object(storage, key) == digest for key, digest in expected.items())
    result = found.result()
    assert (result.name, result.sealed, result.blocks, result.missing_blocks) == ("the first build", True, 3, ())


@pytest.mark.parametrize(
    "key, part",
    [
        ("zarr.json", "manifest"),
        ("commits.sha256", "seal"),
        ("hidden/zarr.json", "metadata"),
        ("hidden/2/codes/byte/zarr.json", "metadata"),
        ("hidden/2/basis/c/0/0", "constant"),
        ("hidden/2/variance/zarr.json", "constant"),
        ("teacher/config.json", "teacher"),
        ("teacher.json", "teacher"),
    ],
)
def test_each_object_is_called_by_what_it_is(nmse_store: Path, key: str, part: str) -> None:
    expected = {one.key: one for one in survey(LocalStorage(nmse_store)).expected}
    assert expected[key].part == part if key in expected else survey(LocalStorage(nmse_store))._part_of(key) == part


def test_shards_are_told_with_array_and_block(nmse_store: Path) -> None:
    expected = {one.key: one for one in survey(LocalStorage(nmse_store)).expected}
    one = expected["hidden/2/escapes/count/c/2/0"]
    assert (one.part, one.array, one.block) == ("shard", "hidden/2/escapes/count", 2)


HOSTILE = [b"", b"\x00" * 40, b"[]", b"{}", b"null", b"7", b'"text"', b"[" * 5000, b"{" * 5000, b"\xff\xfe\x00",
           b'{"sha256": null}', b'{"attributes": {}}', b'{"attributes": {"format": "kdcache"}}',
           b'{"sha256": "0", "shards": []}', b"1e999999", b"0" * 5000]  # fmt: skip


@pytest.mark.parametrize("key", PROTOCOL[:3])
@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_objects_are_findings(nmse_store: Path, key: str, content: bytes) -> None:
    draft = Overlay(LocalStorage(nmse_store))
    draft.write(key, content)
    found = survey(draft)
    assert key in {finding.key for finding in found.findings}
    for finding in found.findings:
        assert finding.what and str(finding).startswith(finding.key)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(PROTOCOL), data=st.data())
def test_a_changed_byte_of_any_of_them_is_found(nmse_store: Path, key: str, data: st.DataObject) -> None:
    """By the survey, or by the hash that it expects of the object."""
    draft = Overlay(LocalStorage(nmse_store))
    content = bytearray(draft.read(key))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    draft.write(key, bytes(content))
    found = survey(draft)
    expected = {one.key: one.digest for one in found.expected}
    named = key in {finding.key for finding in found.findings}
    assert named or expected[key] != digest_object(draft, key)


def test_without_its_manifest_a_group_is_known_by_its_seal(nmse_store: Path) -> None:
    draft = Overlay(LocalStorage(nmse_store))
    whole = survey(draft)
    draft.delete("zarr.json")
    found = survey(draft)
    assert [(finding.key, finding.what) for finding in found.findings] == [("zarr.json", "is missing")]
    assert {one.key for one in found.expected} == {one.key for one in whole.expected}
    assert (found.result().blocks, found.result().manifest) == (3, None)


def test_without_its_seal_a_group_is_known_by_its_manifest(nmse_store: Path) -> None:
    """Then a block without a commit is missing and no damage, and shards are vouched for by commits alone."""
    draft = Overlay(LocalStorage(nmse_store))
    for key in ("seal.json", "commits/00000001.json"):
        draft.delete(key)
    found = survey(draft)
    assert not found.findings
    assert found.result().missing_blocks == (1,) and not found.result().sealed
    assert {one.part for one in found.expected} == {"shard"}
    assert {one.block for one in found.expected} == {0, 2}
    found.run_unsealed(set())
    assert not found.findings
    assert set(draft.list()) <= found.accounted | {one.key for one in found.expected}


def forge(draft: Overlay, key: str, **fields: object) -> None:
    """An object whose checksum is right and whose contents are not."""
    kind = Commit if key.startswith("commits") else Seal
    value = kind.from_bytes(draft.read(key))
    for name, content in fields.items():
        object.__setattr__(value, name, content)
    draft.write(key, value.to_bytes())


@pytest.mark.parametrize(
    "key, fields, part, what",
    [
        ("seal.json", {"rows": 41}, "seal", "counts other rows or blocks than the manifest"),
        ("seal.json", {"bytes_per_array": {}}, "seal", "counts other bytes than the commits"),
        ("commits/00000001.json", {"block": 2}, "commit", "is not the one that was sealed"),
    ],
)
def test_contents_that_contradict_each_other_are_found_though_every_checksum_is_right(
    nmse_store: Path, key: str, fields: dict[str, object], part: str, what: str
) -> None:
    draft = Overlay(LocalStorage(nmse_store))
    forge(draft, key, **fields)
    (finding,) = survey(draft).findings
    assert (finding.key, finding.part, finding.what) == (key, part, what)


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"rows": (16, 31)}, r"is about rows (16, 31) of block 1"),
        ({"block": 0}, r"is about rows (16, 32) of block 0"),
        ({"shards": {}}, "lacks ["),
    ],
)
def test_a_commit_that_no_seal_vouches_for_must_say_what_the_manifest_implies(
    nmse_store: Path, fields: dict[str, object], what: str
) -> None:
    draft = Overlay(LocalStorage(nmse_store))
    draft.delete("seal.json")
    forge(draft, "commits/00000001.json", **fields)
    (finding,) = survey(draft).findings
    assert finding.block == 1 and what in finding.what


def test_a_list_of_commits_that_is_damaged_is_not_believed(nmse_store: Path) -> None:
    """All commits are right: they are not called damaged because their list is."""
    draft = Overlay(LocalStorage(nmse_store))
    lines = draft.read("commits.sha256").decode().splitlines(keepends=True)
    draft.write("commits.sha256", "".join(reversed(lines)).encode())
    assert not survey(draft).findings
    assert json.loads(draft.read("seal.json"))["objects"]["commits.sha256"]["size"] == len("".join(lines))
