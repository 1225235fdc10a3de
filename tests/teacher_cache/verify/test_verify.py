"""Everything that is not what was written is named, refused by readers, and made again where a build can do that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from teacher_cache.errors import StoreError
from teacher_cache.format.protocol import NOT_AN_OBJECT, Commit, Seal
from teacher_cache.read.info import describe_store
from teacher_cache.storage.base import open_storage
from teacher_cache.storage.local import LocalStorage
from teacher_cache.verify.evict import evict_damage
from teacher_cache.verify.verify import verify_store
from tests.teacher_cache.verify.damages import DAMAGES, check, edit, files_of, read_everything

if TYPE_CHECKING:
    from tests.conftest import S3Server


def test_a_finished_store_is_whole_and_every_byte_of_it_is_accounted_for(store: Path) -> None:
    report = check(store)
    assert report.whole
    assert not report.findings
    assert not report.unknown
    assert [(group.name, group.sealed, group.blocks) for group in report.groups] == [
        ("the first build", True, 3),
        ("extension 1", True, 3),
    ]
    files = files_of(store)
    read = {key for key in files if key.startswith(("commits/", "extensions/1/commits/")) or key.endswith("seal.json")}
    assert report.objects == len(files) - len(read)
    assert report.bytes == sum(len(data) for key, data in files.items() if key not in read)


def test_progress_counts_up_to_everything(store: Path) -> None:
    class Progress:
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int, int]] = []

        def checked(self, done: int, total: int, bytes_done: int, bytes_total: int) -> None:
            self.seen.append((done, total, bytes_done, bytes_total))

    progress = Progress()
    report = verify_store(LocalStorage(store), progress)
    assert [one[0] for one in progress.seen] == list(range(1, report.objects + 1))
    assert progress.seen[-1] == (report.objects, report.objects, report.bytes, report.bytes)


def test_what_nothing_accounts_for_is_unknown_and_no_damage(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    (store / "hidden/2/codes/extra").mkdir()
    (store / "hidden/2/codes/extra/zarr.json").write_text("{}")
    (store / "commits/00000007.json").write_text("{}")
    report = check(store)
    assert report.whole
    assert dict(report.unknown) == {
        "notes.txt": 4,
        "hidden/2/codes/extra/zarr.json": 2,
        "commits/00000007.json": 2,
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_refused_and_evicted_where_it_can_be_mended(store: Path, name: str) -> None:
    damage = DAMAGES[name]
    damage.do(store)
    report = check(store)
    assert not report.whole
    found = {finding.key: finding for finding in report.findings}[damage.key]
    assert (found.part, found.block, found.group) == (damage.part, damage.block, damage.group)
    assert damage.what in found.what
    assert found.array == (damage.key.partition("/c/")[0] if damage.part == "shard" else None)
    assert not report.unknown
    if damage.readable:
        read_everything(store)
    else:
        with pytest.raises(StoreError):
            read_everything(store)
    before = files_of(store)
    again, eviction = evict_damage(LocalStorage(store))
    assert again == report
    if not damage.mendable:
        assert [finding.key for finding in eviction.beyond_repair] == [damage.key]
        assert not eviction.groups
        assert files_of(store) == before
        return
    assert not eviction.beyond_repair
    (group,) = eviction.groups
    assert group.name == damage.group
    # what is left is right; the other group still misses what both share
    assert {finding.key for finding in check(store).findings} == ({damage.key} if damage.shared else set())
    prefix = "extensions/1/" if damage.group == "extension 1" else ""
    assert not (store / prefix / "seal.json").exists()
    for block in range(3):
        assert (store / prefix / f"commits/{block:08d}.json").exists() == (block not in group.blocks)


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        check(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no store at"):
        evict_damage(LocalStorage(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="is not a store"):
        check(tmp_path)


def test_a_build_may_end_while_it_is_looked_at(store: Path) -> None:
    class BeforeTheEnd(LocalStorage):
        """The first look at what is there comes before the last block and the seal."""

        looked = False

        def list(self, prefix: str = "") -> dict[str, int]:
            found = super().list(prefix)
            if not self.looked:
                found = {key: size for key, size in found.items() if key not in ("commits/00000002.json", "seal.json")}
            self.looked = True
            return found

    report = verify_store(BeforeTheEnd(store))
    assert report.whole and not report.findings
    (store / "commits/00000002.json").unlink()
    assert [finding.key for finding in verify_store(BeforeTheEnd(store)).findings] == ["commits/00000002.json"]


def test_another_format_version_is_refused_not_called_damage(store: Path) -> None:
    edit(store / "zarr.json", '"format_version": 1', '"format_version": 2')
    (store / "seal.json").unlink()
    with pytest.raises(StoreError, match="format version 2"):
        check(store)


def test_a_store_in_object_storage_is_checked_alike(s3: S3Server, grown_store: Path) -> None:
    location = f"{s3.bucket('verify')}/cache.zarr"
    storage = open_storage(location)
    for key, data in files_of(grown_store).items():
        storage.write(key, data)
    assert verify_store(storage).whole
    storage.write("input_ids/c/1/0/0", b"other")
    storage.delete("hidden/3/escapes/count/c/2/0")
    report, eviction = evict_damage(storage)
    assert [finding.key for finding in report.findings] == ["hidden/3/escapes/count/c/2/0", "input_ids/c/1/0/0"]
    assert [(group.name, group.blocks) for group in eviction.groups] == [
        ("the first build", (1,)),
        ("extension 1", (2,)),
    ]
    assert storage.size("seal.json") is None
    assert not verify_store(storage).findings


def test_info_points_to_verify_where_a_finished_store_has_lost_something(store: Path) -> None:
    DAMAGES["a missing shard"].do(store)
    info = describe_store(store)
    assert info.groups[0].sealed
    assert info.missing_blocks == (0,)


def test_commits_and_seals_are_what_was_written_byte_for_byte(store: Path) -> None:
    for key, kind in (("commits/00000000.json", Commit), ("seal.json", Seal)):
        data = (store / key).read_bytes()
        assert kind.from_bytes(data).to_bytes() == data
        for changed in (data + b" ", data.replace(b"\n", b"\r\n"), json.dumps(json.loads(data)).encode()):
            with pytest.raises(ValueError, match="checksum"):
                kind.from_bytes(changed)
        for place in range(0, len(data), 3):
            flipped = bytearray(data)
            flipped[place] ^= 1
            with pytest.raises(NOT_AN_OBJECT):
                kind.from_bytes(bytes(flipped))
